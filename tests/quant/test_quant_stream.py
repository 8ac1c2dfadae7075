"""LoftQ over a checkpoint on disk: each layer as in memory, whatever the order, the processes or the accidents."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quant
from quant import LoftQConfig, QuantError, QuantizedTensor, load_quantized_, loftq, loftq_model
from quant.stream import StreamConfig, load_checkpoint_, loftq_checkpoint
from quant.stream.byte_copy import split, write_safetensors
from quant.stream.header import read_header
from quant.stream.layers import find_layers, share

CONFIG = StreamConfig(rank=4, iterations=2, block_size=16)
WIDTH, INNER, WORDS = 32, 48, 40


def checkpoint_tensors() -> dict[str, Tensor]:
    """Two blocks of odd neighbours: three dtypes, a bias, a norm, an embedding, a head, integers."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": drawn(WORDS, WIDTH), "lm_head.weight": drawn(WORDS, WIDTH)}
    for block in range(2):
        at = f"model.layers.{block}"
        tensors[f"{at}.attention.query.weight"] = drawn(WIDTH, WIDTH, dtype=torch.float16)
        tensors[f"{at}.attention.query.bias"] = drawn(WIDTH, dtype=torch.float16)
        tensors[f"{at}.up.weight"] = drawn(INNER, WIDTH, dtype=torch.float32)
        tensors[f"{at}.down.weight"] = drawn(WIDTH, INNER)
        tensors[f"{at}.norm.weight"] = drawn(WIDTH)
        tensors[f"{at}.steps"] = torch.arange(3)
    return tensors


LAYERS = [f"model.layers.{block}.{name}" for block in range(2) for name in ("attention.query", "down", "up")]


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], files: int = 2) -> Path:
    """Write tensors as transformers does, dealt out over some files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not to be copied")
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {
        key: f"model-{place % files + 1:05d}-of-{files:05d}.safetensors" for place, key in enumerate(tensors)
    }
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "source", checkpoint_tensors())


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a result, but for the record of the job, which names times of the source."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "stream.json" and ".work" not in path.parts
    }


def stored_tensors(folder: Path, stem: str = "quant") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        found = load_file(path)
        assert tensors.keys().isdisjoint(found)
        tensors.update(found)
    return tensors


@pytest.mark.parametrize("files", [1, 2, 5])
@pytest.mark.parametrize(("storage", "iterations"), [("float32", 2), ("double", 2), ("float16", 0)])
def test_each_layer_is_its_loftq_in_memory(tmp_path: Path, files: int, storage: str, iterations: int) -> None:
    tensors = checkpoint_tensors()
    source = save_checkpoint(tmp_path / "source", tensors, files)
    config = replace(
        CONFIG, scale_storage=storage, iterations=iterations, formats=((r"1\.up", 2), (r"up", "nf2"))
    )
    reports = loftq_checkpoint(source, tmp_path / "out", config)
    found = stored_tensors(tmp_path / "out")
    assert [report.name for report in reports] == LAYERS
    formats = {"model.layers.0.up": "nf2", "model.layers.1.up": "uint2"}
    for report in reports:
        weight, format = tensors[f"{report.name}.weight"], formats.get(report.name, "nf4")
        seed = zlib.crc32(f"0 {report.name}".encode())
        expected = loftq(weight, format, 4, iterations, 16, scale_storage=storage, seed=seed)
        parts = {**expected.quantized.parts(), "lora_A": expected.lora_A, "lora_B": expected.lora_B}
        for key, part in parts.items():
            stored = found.pop(f"{report.name}.{key}")
            assert stored.dtype == part.dtype
            assert torch.equal(stored, part)
        assert report.errors == tuple(expected.errors)
        assert (report.format, report.shape) == (format, tuple(weight.shape))
        bias = tensors.get(f"{report.name}.bias")
        if bias is not None:
            assert torch.equal(found.pop(f"{report.name}.bias"), bias)
        assert report.bytes_before == weight.nbytes + (0 if bias is None else bias.nbytes)
        assert report.bytes_after == sum(p.nbytes for p in parts.values()) + (
            0 if bias is None else bias.nbytes
        )
    assert not found


def test_all_other_tensors_are_copied_bit_for_bit_and_the_tokenizer_with_them(
    tmp_path: Path, source: Path
) -> None:
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    taken = {f"{name}.{kind}" for name in LAYERS for kind in ("weight", "bias")}
    expected = {key: tensor for key, tensor in checkpoint_tensors().items() if key not in taken}
    found = stored_tensors(tmp_path / "out", "unquantized")
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "quant.json", "quant.safetensors", "stream.json", "tokenizer.json", "unquantized.safetensors",
    ]  # fmt: skip


def test_the_result_is_the_same_however_the_source_is_cut(tmp_path: Path, source: Path) -> None:
    single = save_checkpoint(tmp_path / "single", checkpoint_tensors(), files=1)
    loftq_checkpoint(source, tmp_path / "a", CONFIG)
    loftq_checkpoint(single, tmp_path / "b", CONFIG)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_files_stay_below_the_bound_and_the_index_names_them(tmp_path: Path, source: Path) -> None:
    loftq_checkpoint(source, tmp_path / "whole", CONFIG)
    loftq_checkpoint(source, tmp_path / "cut", replace(CONFIG, shard_bytes=3000))
    whole, cut = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    files = sorted((tmp_path / "cut").glob("quant-*.safetensors"))
    assert len(files) > 2
    for path in files:
        held = load_file(path)
        assert sum(tensor.nbytes for tensor in held.values()) <= 3000
    index = json.loads((tmp_path / "cut" / "quant.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: path.name for path in files for key in load_file(path)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in cut.values())


def test_a_second_run_does_nothing_and_another_one_replaces_the_result(tmp_path: Path, source: Path) -> None:
    told: list[str] = []
    first = loftq_checkpoint(source, tmp_path / "out", replace(CONFIG, shard_bytes=3000))
    again = loftq_checkpoint(
        source,
        tmp_path / "out",
        replace(CONFIG, shard_bytes=3000),
        on_layer=lambda name, *_: told.append(name),
    )
    assert again == first
    assert told == []
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    assert not list((tmp_path / "out").glob("quant-*"))
    loftq_checkpoint(source, tmp_path / "new", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def run_process(source: Path, output: Path, place: int, processes: int, *more: str) -> subprocess.Popen[str]:
    root = str(Path(quant.__file__).parents[1])
    environment = {**os.environ, "RANK": str(place), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "quant.stream",
        str(source),
        str(output),
        "--rank",
        "4",
        "--iterations",
        "2",
    ]
    command += ["--block-size", "16", "--patience", "60", *more]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path, source: Path) -> None:
    loftq_checkpoint(source, tmp_path / "one", CONFIG)
    running = [run_process(source, tmp_path / "two", place, 2) for place in range(2)]
    told = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    layers = [
        {line.split()[-1] for line in out.splitlines() if line.split()[-1] in LAYERS} for out, _ in told
    ]
    assert all(layers)
    assert layers[0] | layers[1] == set(LAYERS)
    assert not layers[0] & layers[1]


def test_what_a_dead_process_left_is_used_and_what_is_missing_done(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loftq_checkpoint(source, tmp_path / "new", CONFIG)
    with pytest.raises(QuantError, match=r"3 of 6 layers .* no process has added one"):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, process=0, processes=2, patience=0.0)
    with pytest.raises(QuantError, match=r"6 of 6 layers"):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, process=1, processes=2, patience=0.0)
    assert len(parts_of(tmp_path / "out")) == 6
    # Nothing is left to compute.
    monkeypatch.setattr("quant.stream.part.loftq", None)
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
    assert not (tmp_path / "out" / ".work").exists()


def test_a_process_under_whose_feet_the_others_finish_comes_to_their_result(
    tmp_path: Path, source: Path
) -> None:
    reports: list[object] = []

    def finish(name: str, done: int, total: int) -> None:
        if not reports:
            reports.append(loftq_checkpoint(source, tmp_path / "out", CONFIG))

    assert (
        loftq_checkpoint(source, tmp_path / "out", CONFIG, process=1, processes=2, on_layer=finish)
        == reports[0]
    )
    assert not (tmp_path / "out" / ".work").exists()


def parts_of(output: Path) -> list[Path]:
    """Return the finished layers of a run that was stopped."""
    return sorted((output / ".work").glob("parts*/*.safetensors"))


class Killed(Exception):
    pass


def kill_after(layers: int) -> object:
    def on_layer(name: str, done: int, total: int) -> None:
        if done == layers:
            raise Killed

    return on_layer


@pytest.mark.parametrize("layers", [1, 4, 6])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, source: Path, layers: int) -> None:
    with pytest.raises(Killed):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, on_layer=kill_after(layers))
    assert not (tmp_path / "out" / "quant.json").exists()
    before = {path: path.stat().st_mtime_ns for path in parts_of(tmp_path / "out")}
    assert len(before) == layers
    with pytest.raises(Killed):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, on_layer=kill_after(6))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    loftq_checkpoint(source, tmp_path / "new", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("damage", ["cut short", "another layer's", "a bit", "no hash"])
def test_a_part_that_is_not_whole_is_done_again(tmp_path: Path, source: Path, damage: str) -> None:
    with pytest.raises(Killed):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, on_layer=kill_after(2))
    first, second = parts_of(tmp_path / "out")
    whole = first.read_bytes()
    changed = {
        "cut short": whole[:-1], "another layer's": second.read_bytes(),
        "a bit": whole[:-1] + bytes([whole[-1] ^ 1]), "no hash": whole,
    }  # fmt: skip
    first.write_bytes(changed[damage])
    hashed = first.with_suffix(".sha256")
    if damage == "another layer's":
        hashed.write_bytes(second.with_suffix(".sha256").read_bytes())
    elif damage == "no hash":
        hashed.unlink()
    written = [path.stat().st_ino for path in (first, second)]
    with pytest.raises(Killed):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, on_layer=kill_after(2))
    again = [path.stat().st_ino for path in (first, second)]
    assert again[0] != written[0]
    assert again[1] == written[1]
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    loftq_checkpoint(source, tmp_path / "new", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_a_finished_run_asked_for_again_leaves_the_work_of_another(tmp_path: Path, source: Path) -> None:
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    with pytest.raises(Killed):
        loftq_checkpoint(source, tmp_path / "out", replace(CONFIG, rank=5), on_layer=kill_after(4))
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    assert len(parts_of(tmp_path / "out")) == 4


def test_the_first_process_waits_for_a_damaged_part_of_another(tmp_path: Path, source: Path) -> None:
    with pytest.raises(Killed):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, on_layer=kill_after(6))
    for path in parts_of(tmp_path / "out"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(QuantError, match="no process has added one"):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, process=0, processes=2, patience=0.0)
    with pytest.raises(QuantError, match="no process has added one"):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, process=1, processes=2, patience=0.0)
    loftq_checkpoint(source, tmp_path / "out", CONFIG, process=0, processes=2, patience=0.0)
    loftq_checkpoint(source, tmp_path / "new", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("left", ["all", "no job file", "some parts"])
def test_what_is_left_of_a_finished_run_is_in_no_other_ones_way(
    tmp_path: Path, source: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr("quant.stream.work.Job.end", lambda job: None)
        loftq_checkpoint(source, tmp_path / "out", CONFIG)
    if left == "no job file":
        (tmp_path / "out" / ".work" / "job.json").unlink()
    elif left == "some parts":
        for path in parts_of(tmp_path / "out")[:3]:
            path.unlink()
    other = replace(CONFIG, rank=5)
    loftq_checkpoint(source, tmp_path / "out", other)
    loftq_checkpoint(source, tmp_path / "new", other)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.parametrize("name", ["config.json", "quant.safetensors", "quant.json", "stream.json"])
def test_a_file_that_vanished_from_the_result_comes_back(tmp_path: Path, source: Path, name: str) -> None:
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    assert contents(tmp_path / "out") == before


def test_an_unfinished_run_is_not_taken_up_with_other_settings_or_another_source(
    tmp_path: Path, source: Path
) -> None:
    with pytest.raises(Killed):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, on_layer=kill_after(2))
    with pytest.raises(QuantError, match="format 'nf4' instead of 'nf2'"):
        loftq_checkpoint(source, tmp_path / "out", replace(CONFIG, format="nf2"))
    path = source / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight" if "lm_head.weight" in tensors else next(iter(tensors))] += 1
    save_file(tensors, path)
    os.utime(path, ns=(0, 10**18))
    with pytest.raises(QuantError, match="other source files"):
        loftq_checkpoint(source, tmp_path / "out", CONFIG)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.unlink(), r"model-00002-of-00002\.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, and its header tells of"),
        (lambda path: path.write_bytes(b"nothing"), "header cannot be read"),
        (lambda path: path.write_bytes(b""), "header cannot be read"),
        (
            lambda path: save_file({"other": torch.ones(1)}, path),
            "which model.safetensors.index.json promises",
        ),
    ],
)
def test_a_damaged_source_is_refused_and_an_earlier_result_left_alone(
    tmp_path: Path, source: Path, damage: object, match: str
) -> None:
    loftq_checkpoint(source, tmp_path / "out", replace(CONFIG, format="int4"))
    before = contents(tmp_path / "out")
    damage(source / "model-00002-of-00002.safetensors")
    with pytest.raises(QuantError, match=match):
        loftq_checkpoint(source, tmp_path / "out", CONFIG)
    assert contents(tmp_path / "out") == before


def test_a_weight_that_is_not_finite_is_named_and_an_earlier_result_left_alone(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    source = save_checkpoint(tmp_path / "source", tensors, files=1)
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    before = contents(tmp_path / "out")
    tensors["model.layers.1.up.weight"][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors")
    os.utime(source / "model.safetensors", ns=(0, 10**18))
    with pytest.raises(QuantError, match=r"model\.layers\.1\.up: .* nan"):
        loftq_checkpoint(source, tmp_path / "out", CONFIG)
    assert contents(tmp_path / "out") == before


def test_what_cannot_be_quantized_is_refused_before_anything_is_written(tmp_path: Path, source: Path) -> None:
    with pytest.raises(QuantError, match="no tensor of the checkpoint"):
        loftq_checkpoint(source, tmp_path / "out", replace(CONFIG, include=("absent",)))
    with pytest.raises(
        QuantError, match="no layer to quantize has a name with 'dwn_proj', which was to be 2"
    ):
        loftq_checkpoint(source, tmp_path / "out", replace(CONFIG, formats=(("dwn_proj", 2),)))
    with pytest.raises(QuantError, match="source and output at once"):
        loftq_checkpoint(source, source, CONFIG)
    with pytest.raises(QuantError, match="process 2 of 2"):
        loftq_checkpoint(source, tmp_path / "out", CONFIG, process=2, processes=2)
    with pytest.raises(QuantError, match="neither"):
        loftq_checkpoint(tmp_path / "nowhere", tmp_path / "out", CONFIG)
    (source / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(QuantError, match="quantized already"):
        loftq_checkpoint(source, tmp_path / "out", CONFIG)
    integers = save_checkpoint(tmp_path / "integers", {"up.weight": torch.ones(4, 4, dtype=torch.int8)})
    with pytest.raises(QuantError, match=r"up\.weight is I8"):
        loftq_checkpoint(integers, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"format": "nf5"}, "nf5"),
        ({"formats": (("up", "nf5"),)}, "nf5"),
        ({"formats": (("(", "nf4"),)}, "not a regular expression"),
        ({"block_size": 48}, "block of 48"),
        ({"scale_storage": "float8"}, "float8"),
        ({"rank": 0}, "rank 0 are not possible"),
        ({"iterations": -1}, "-1 iterations"),
        ({"shard_bytes": 0}, "files of 0 bytes"),
    ],
)
def test_a_wrong_setting_is_refused(setting: dict, match: str) -> None:
    with pytest.raises(QuantError, match=match):
        StreamConfig(**setting)


def test_a_single_expression_need_not_stand_in_a_tuple() -> None:
    config = StreamConfig(stacked="experts")
    assert config.takes_stack("mlp.experts.up")
    assert not config.takes_stack("sorted")  # holds letters of it


def test_each_expert_of_a_stack_is_a_layer_of_its_own(tmp_path: Path) -> None:
    stack = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensors = {"layers.0.mlp.experts.up_proj": stack, "layers.0.mlp.gate.weight": torch.ones(3, 48)}
    tensors |= {"layers.0.conv.weight": torch.ones(4, 1, 3), "layers.0.A_log": torch.ones(16, 16)}
    source = save_checkpoint(tmp_path / "source", tensors, files=1)
    reports = loftq_checkpoint(source, tmp_path / "out", CONFIG)
    names = [f"layers.0.mlp.experts.up_proj.{index}" for index in range(3)]
    assert [report.name for report in reports] == names
    assert sum(report.bytes_before for report in reports) == stack.nbytes
    found = stored_tensors(tmp_path / "out")
    for index, name in enumerate(names):
        expected = loftq(stack[index], "nf4", 4, 2, 16, seed=zlib.crc32(f"0 {name}".encode()))
        parts = {key: found[f"{name}.{key}"] for key in ("codes", "absmax")}
        stored = QuantizedTensor.from_parts(parts, shape=(32, 48), format="nf4", block_size=16)
        assert torch.equal(stored.dequantize(), expected.quantized.dequantize())
        assert torch.equal(found[f"{name}.lora_B"], expected.lora_B)
    assert stored_tensors(tmp_path / "out", "unquantized").keys() == tensors.keys() - {
        "layers.0.mlp.experts.up_proj"
    }
    with pytest.raises(QuantError, match="one of a stack"):
        loftq_checkpoint(source, tmp_path / "peft", replace(CONFIG, peft_adapters=True))


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(11, 32, 48))
        self.norm = nn.LayerNorm(48)


@pytest.mark.parametrize("storage", ["float32", "double"])
def test_a_stack_is_put_together_again_when_it_is_loaded(tmp_path: Path, storage: str) -> None:
    source = save_checkpoint(tmp_path / "source", Stacked().state_dict(), files=1)
    config = replace(CONFIG, scale_storage=storage, alpha=8)
    loftq_checkpoint(source, tmp_path / "out", config)
    with torch.device("meta"):
        model = Stacked()
    assert load_checkpoint_(model, tmp_path / "out") == []
    for index in range(11):
        name = f"experts.up.{index}"
        expected = loftq(
            Stacked().experts.up[index], "nf4", 4, 2, 16, scale_storage=storage,
            seed=zlib.crc32(f"0 {name}".encode()),
        )  # fmt: skip
        weight = expected.quantized.dequantize() + expected.lora_B @ expected.lora_A
        torch.testing.assert_close(model.experts.up[index], weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.norm.weight, torch.ones(48))
    smaller = Stacked()
    smaller.experts.up = nn.Parameter(torch.zeros(9, 32, 48))
    with pytest.raises(QuantError, match="a stack of 9 in the model, of which 11 are stored"):
        load_checkpoint_(smaller, tmp_path / "out")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_all_layers_and_about_equally(source: Path, processes: int) -> None:
    from quant.stream.source import open_checkpoint

    layers = find_layers(open_checkpoint(source).tensors, CONFIG)
    shares = [share(layers, place, processes) for place in range(processes)]
    assert sorted(layer.name for each in shares for layer in each) == LAYERS
    loads = [sum(layer.shape[0] * layer.shape[1] for layer in each) for each in shares]
    # Graham's bound for this rule: at most one largest layer between the fullest and the emptiest.
    assert max(loads) - min(loads) <= WIDTH * INNER


def test_the_largest_layers_are_dealt_first(tmp_path: Path) -> None:
    save_file(
        {f"{name}.weight": torch.ones(rows, 4) for name, rows in (("a", 1), ("b", 1), ("c", 2))},
        tmp_path / "f",
    )
    layers = find_layers(read_header(tmp_path / "f").tensors, StreamConfig())
    assert [[layer.name for layer in share(layers, place, 2)] for place in range(2)] == [["c"], ["a", "b"]]


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "lm_head", "transformer.wte", "h.0.ln_1", "mlp.gate", "shared"]
)
def test_embeddings_heads_norms_and_routers_are_left_by_default(name: str) -> None:
    assert not StreamConfig().includes(name)


@pytest.mark.parametrize(
    "name", ["l.0.q_proj", "l.0.mlp.gate_proj", "l.0.mlp.shared_expert.up_proj", "h.0.attn.c_attn"]
)
def test_linear_layers_are_taken_by_default(name: str) -> None:
    assert StreamConfig().includes(name)


def test_a_file_put_together_from_others_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8), "wide": torch.arange(3, dtype=torch.float64),
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "half": torch.ones(3).bfloat16(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors", read_header(tmp_path / "a.safetensors").tensors)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(key), tensors[key]) for key in tensors)
    for stored in read_header(tmp_path / "b.safetensors").tensors.values():
        assert stored.start % {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}[stored.dtype] == 0


def test_a_cut_keeps_the_order_and_gives_a_larger_tensor_a_file_of_its_own(tmp_path: Path) -> None:
    sizes = [3, 4, 20, 1, 1, 8, 2]
    save_file({f"{k}": torch.zeros(size, dtype=torch.uint8) for k, size in enumerate(sizes)}, tmp_path / "a")
    shards = split(dict(sorted(read_header(tmp_path / "a").tensors.items())), 9)
    assert [[tensor.nbytes for tensor in shard.values()] for shard in shards] == [
        [3, 4],
        [20],
        [1, 1],
        [8],
        [2],
    ]


def llama(**settings: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = torch.arange(12).view(2, 6)


def weights_in_effect(folder: Path) -> dict[str, np.ndarray]:
    """Return the dense weights of a result by way of numpy: levels times scales, plus the product."""
    index, found = json.loads((folder / "quant.json").read_text()), stored_tensors(folder)
    weights = {}
    for name, entry in index["layers"].items():
        parts = {key: found[f"{name}.{key}"].numpy() for key in ("codes", "absmax", "lora_A", "lora_B")}
        codes = np.stack([parts["codes"] >> 4, parts["codes"] & 15], axis=1).reshape(-1)
        levels = quant.get_format("nf4").levels.double().numpy()[codes]
        dense = (levels.reshape(-1, entry["block_size"]) * parts["absmax"][:, None]).reshape(entry["shape"])
        weights[name] = dense + parts["lora_B"].astype(np.float64) @ parts["lora_A"].astype(np.float64)
    return weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_llama_on_the_meta_device_takes_the_result_and_runs(
    tmp_path: Path, tied: bool, shard_bytes: int
) -> None:
    accelerate = pytest.importorskip("accelerate")
    dense = llama(attention_bias=True, tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    dense.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", replace(CONFIG, shard_bytes=shard_bytes))
    with torch.no_grad():
        for name, weight in weights_in_effect(tmp_path / "out").items():
            dense.get_submodule(name).weight.copy_(torch.from_numpy(weight))
    with accelerate.init_empty_weights():
        empty = llama(attention_bias=True, tie_word_embeddings=tied)
    assert load_checkpoint_(empty.eval(), tmp_path / "out") == []
    assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(empty(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)
    loaded = llama(attention_bias=True, tie_word_embeddings=tied)
    load_quantized_(loaded, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, empty(TOKENS).logits)


SCALINGS = [{}, {"alpha": 8}, {"alpha": 3, "rslora": True}]


@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_model_in_memory_becomes_the_same(tmp_path: Path, iterations: int, scaling: dict) -> None:
    streamed, in_memory = llama(), llama()
    streamed.save_pretrained(tmp_path / "source")
    config = replace(CONFIG, iterations=iterations, **scaling)
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", config)
    load_checkpoint_(streamed, tmp_path / "out")
    plain = LoftQConfig(rank=4, iterations=iterations, block_size=16, exclude=("lm_head",), **scaling)
    loftq_model(in_memory, plain)
    assert streamed.model.layers[0].mlp.up_proj.scaling == plain.scaling
    first, second = streamed.state_dict(), in_memory.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_stays_on_the_meta_device_or_has_another_shape_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", CONFIG)
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(QuantError, match=r"on the meta device still.*inv_freq"):
        load_checkpoint_(empty, tmp_path / "out")
    half = llama().bfloat16()
    load_checkpoint_(half, tmp_path / "out")
    assert half.model.norm.weight.dtype == half(TOKENS).logits.dtype == torch.bfloat16
    model = llama()
    model.model.norm.weight = nn.Parameter(torch.ones(8))
    with pytest.raises(QuantError, match=r"model\.norm\.weight has the shape \(8,\)"):
        load_checkpoint_(model, tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_missing_file_and_a_changed_bit_of_any_file_is_named_and_the_model_left_as_it_was(
    tmp_path: Path, shard_bytes: int
) -> None:
    llama().save_pretrained(tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", replace(CONFIG, shard_bytes=shard_bytes))
    model, before = llama(), llama().state_dict()
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(QuantError, match=f"{path.name} is not the file that"):
            load_checkpoint_(model, tmp_path / "out")
        path.unlink()
        with pytest.raises(QuantError, match=f"holds no {path.name}"):
            load_checkpoint_(model, tmp_path / "out")
        path.write_bytes(whole)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert load_checkpoint_(model, tmp_path / "out") == []


def test_what_save_quantized_wrote_is_not_taken_for_a_whole_checkpoint(tmp_path: Path) -> None:
    model, _ = loftq_model(llama(), LoftQConfig(rank=4, iterations=0))
    quant.save_quantized(model, tmp_path)
    with pytest.raises(QuantError, match=r"quant\.json does not say what unquantized\.safetensors was"):
        load_checkpoint_(llama(), tmp_path)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_peft_reads_the_adapters(tmp_path: Path, scaling: dict) -> None:
    peft = pytest.importorskip("peft")
    dense = llama()
    dense.save_pretrained(tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", replace(CONFIG, peft_adapters=True, **scaling))
    packed = llama()
    load_quantized_(packed, tmp_path / "out")
    base = llama()
    with torch.no_grad():
        for name in json.loads((tmp_path / "out" / "quant.json").read_text())["layers"]:
            base.get_submodule(name).weight.copy_(packed.get_submodule(name).quantized.dequantize())
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(TOKENS).logits, packed(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_a_module_holds_itself_are_loaded_in_its_place(tmp_path: Path) -> None:
    """GPT-2's Conv1D: a checkpoint does not say that it is no linear layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, initializer_range=0.1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    dense, other = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    for block in dense.transformer.h:
        torch.nn.init.normal_(block.mlp.c_fc.bias)
    dense.save_pretrained(tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", replace(CONFIG, alpha=8))
    assert load_checkpoint_(other, tmp_path / "out") == []
    for name, parameter in dense.named_parameters():
        if name.endswith(("c_fc.weight", "c_attn.weight", "c_proj.weight")):
            key = name.removesuffix(".weight")
            seed = zlib.crc32(f"0 {key}".encode())
            expected = loftq(parameter, "nf4", 4, 2, 16, seed=seed)
            with torch.no_grad():
                parameter.copy_(expected.quantized.dequantize() + expected.lora_B @ expected.lora_A)
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_experts_written_one_by_one_are_named_with_what_to_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, num_local_experts=3,
    )  # fmt: skip
    torch.manual_seed(0)
    first, second = (transformers.MixtralForCausalLM(config) for _ in range(2))
    first.save_pretrained(tmp_path / "apart")
    loftq_checkpoint(tmp_path / "apart", tmp_path / "out", CONFIG)
    with pytest.raises(QuantError, match="is nothing in the model") as refused:
        load_checkpoint_(second, tmp_path / "out")
    assert "names in the files must be those of the model's modules" in refused.value.remedy
    first.save_pretrained(tmp_path / "stacked", save_original_format=False)
    loftq_checkpoint(tmp_path / "stacked", tmp_path / "out", CONFIG)
    assert load_checkpoint_(second, tmp_path / "out") == []


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"config": LoftQConfig()}, "config is a LoftQConfig\n.*StreamConfig"),
        ({"patience": -1.0}, "a patience of -1 seconds"),
        ({"patience": float("nan")}, "a patience of nan seconds"),
        ({"device": "nonsense"}, "the device 'nonsense' cannot be used"),
        ({"device": "meta"}, "the device 'meta' cannot be used"),
    ],
)
def test_an_argument_of_no_use_is_refused_before_anything_is_written(
    tmp_path: Path, source: Path, setting: dict, match: str
) -> None:
    with pytest.raises(QuantError, match=match):
        loftq_checkpoint(source, tmp_path / "out", **{"config": CONFIG, **setting})
    assert not (tmp_path / "out").exists()


def run_main(*arguments: object) -> int:
    from quant.stream.__main__ import main

    return main([str(argument) for argument in arguments])


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(tmp_path, tmp_path / "out") == 1
    assert "holds neither" in capsys.readouterr().err
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run_main(source, output) == 1
        assert "cannot be made" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"
    if not torch.cuda.is_available():
        assert run_main(source, tmp_path / "out", "--device", "cuda") == 1
        assert "the device 'cuda:0' cannot be used" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr("quant.stream.checkpoint.write_part", unwritable)
    assert run_main(source, tmp_path / "out") == 1
    assert capsys.readouterr().err.splitlines() == ["error: [Errno 28] No space left on device: 'here'"]


def unwritable(*_: object) -> None:
    raise OSError(28, "No space left on device", "here")


def test_an_interrupted_command_says_that_it_can_be_repeated_which_is_so(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    command = [source, tmp_path / "out", "--rank", 4, "--iterations", 2, "--block-size", 16]
    with monkeypatch.context() as stopped:
        stopped.setattr("quant.stream.__main__._print_layer", interrupted)
        assert run_main(*command) == 130
    assert capsys.readouterr().err == "stopped: the same command goes on where it was\n"
    assert len(parts_of(tmp_path / "out")) == 2
    assert run_main(*command) == 0
    loftq_checkpoint(source, tmp_path / "new", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_a_number_of_bits_is_a_format_on_the_command_line(tmp_path: Path, source: Path) -> None:
    command = [
        source,
        tmp_path / "out",
        "--format",
        2,
        "--format-for",
        "up",
        3,
        "--format-for",
        "down",
        "nf4",
    ]
    assert run_main(*command, "--iterations", 0, "--rank", 1, "--block-size", 16) == 0
    layers = json.loads((tmp_path / "out" / "quant.json").read_text())["layers"]
    expected = {"query": quant.get_format(2).name, "up": quant.get_format(3).name, "down": "nf4"}
    assert {name: entry["format"] for name, entry in layers.items()} == {
        name: expected[name.rpartition(".")[2]] for name in LAYERS
    }
