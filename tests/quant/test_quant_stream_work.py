"""LoftQ over a checkpoint on disk, by several processes, or by one that dies on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from stream_checkpoints import CONFIG, LAYERS, contents, parts_of

import quant
from quant import QuantError
from quant.stream import loftq_checkpoint


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
