"""LoftQ over a checkpoint on disk: each layer as in memory, all else as it was."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stream_checkpoints import (
    CONFIG,
    INNER,
    LAYERS,
    WIDTH,
    checkpoint_tensors,
    contents,
    save_checkpoint,
    stored_tensors,
)
from torch import nn

from quant import QuantError, QuantizedTensor, loftq
from quant.stream import StreamConfig, load_checkpoint_, loftq_checkpoint
from quant.stream.byte_copy import split, write_safetensors
from quant.stream.header import read_header
from quant.stream.layers import find_layers, share


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


@pytest.mark.parametrize("name", ["up.weight", "attention.query.bias"])
def test_what_is_not_finite_is_named_and_an_earlier_result_left_alone(tmp_path: Path, name: str) -> None:
    tensors = checkpoint_tensors()
    source = save_checkpoint(tmp_path / "source", tensors, files=1)
    loftq_checkpoint(source, tmp_path / "out", CONFIG)
    before = contents(tmp_path / "out")
    tensors[f"model.layers.1.{name}"].view(-1)[0] = torch.nan
    save_file(tensors, source / "model.safetensors")
    os.utime(source / "model.safetensors", ns=(0, 10**18))
    with pytest.raises(QuantError, match=rf"model\.layers\.1\.{name.removesuffix('.weight')}.* nan"):
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
