"""The examples for a loop of one's own and for the Trainer run, and say what they do."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import graphprune as gp

EXAMPLES = Path(__file__).parents[2] / "examples"


def shrunk(words: str) -> float:
    before, after = (int(number.replace(",", "")) for number in re.findall(r"([\d,]{6,})", words)[-2:])
    return 1 - after / before


def test_the_loop(capsys):
    names = runpy.run_path(str(EXAMPLES / "lhspg_loop.py"))
    words = capsys.readouterr().out
    assert shrunk(words) == pytest.approx(0.2, abs=0.01)
    assert names["error"] < 1e-5


def test_the_trainer(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lhspg_trainer.py", str(tmp_path)])
    for _ in range(2):  # the second time it goes on from the last checkpoint, and has nothing left to train
        names = runpy.run_path(str(EXAMPLES / "lhspg_trainer.py"))
        assert shrunk(capsys.readouterr().out) == pytest.approx(0.2, abs=0.01)
        assert gp.Plan.load(tmp_path / "plan.json") == names["optimizer"].plan
