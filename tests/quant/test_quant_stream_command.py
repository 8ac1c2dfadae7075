"""The command line of a stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stream_checkpoints import CONFIG, LAYERS, contents, parts_of

import quant
from quant import LoftQConfig, QuantError
from quant.stream import loftq_checkpoint


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
