"""Runs on ONNX files: the recipe, and what is read off their results."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console

from graphprune.pipeline.progress import Reporter
from graphprune.report.terminal import summary_table

SILENT = Reporter(None)

ONNX_RECIPE = """\
graphprune: 1
seed: 3
model: decoder/model.onnx
data: {train: train.txt, evaluate: evaluate.txt, window: 24, evaluate_window: 32, evaluate_windows: 4}
prune: {remove: 0.2, width_multiple: {ffn: 16}, calibration_windows: 8}
quantize: {block_size: 16}
report: {prompts: [the cat sat on], new_tokens: 5, speed_tokens: 4}
"""


def changed(door: Path, *changes: tuple[str, str]) -> Path:
    """Return another recipe, beside the files that it names."""
    text = ONNX_RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = door / "changed.yaml"
    path.write_text(text)
    return path


def printed(report) -> str:
    console = Console(width=120, record=True, file=StringIO())
    console.print(summary_table(report))
    return console.export_text()


def distance(file: Path, other: Path, feeds) -> float:
    found, expected = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
        for path in (file, other)
    )
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))
