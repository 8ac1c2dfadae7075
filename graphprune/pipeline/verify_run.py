"""The verification of a finished export, done again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graphprune.errors import SourceError, VerificationError
from graphprune.export.check import Check
from graphprune.export.verify import TOLERANCE, measure_onnx
from graphprune.export.verify_alone import measure_alone
from graphprune.export.verify_quantized import measure_packed
from graphprune.pipeline.evaluate import recipe_text
from graphprune.pipeline.exported import Exported
from graphprune.pipeline.onnx_arrays import example_arrays
from graphprune.pipeline.onnx_stages import PRUNED, quantized_by
from graphprune.recipe import Recipe
from graphprune.shrink.load import load
from graphprune.source.text import cut_windows, read_text
from graphprune.trace.model import trace
from graphprune.trace.onnx_reading import read_onnx
from quant.errors import QuantError
from quant.linear import QuantLinear
from quant.storage import load_quantized_

# PEFT's folder holds the factors with the root of their scale in each.
_ROUNDING = 1e-5


def verify(exported: Exported, text: str | None = None) -> list[Check]:
    """Verify an exported model: against the run that made it, or by itself if it was named without one.

    Args:
        exported: The model.
        text: A file to verify with in place of the recipe's evaluation text.

    Returns:
        All numbers with their bounds; some may be out of them.

    Raises:
        VerificationError: If the file is broken.
        SourceError: If the run's model or the text cannot be opened.
    """
    if exported.run is None or exported.recipe is None:
        return measure_alone(exported.file, tolerance=TOLERANCE)
    if exported.recipe.model.is_onnx:
        return _of_onnx(exported.file, exported.run, exported.recipe)
    windows = _windows(exported, exported.recipe, text)
    model = open_quantized(exported.run, exported.recipe)
    return [*_adapter_checks(exported.run, model), *measure_onnx(exported.file, model, windows).rows]


def open_quantized(run: Path, recipe: Recipe) -> Any:
    """Return the quantized model of a finished run, from its folder alone.

    Raises:
        SourceError: If a folder that it takes is not there, or does not hold what it should.
    """
    folder = run / ("model" if recipe.recover.base == "quantized" else "recovered")
    for needed in (folder, run / "quant"):
        if not needed.is_dir():
            raise SourceError(
                f"there is no {needed} to verify the ONNX model against",
                f"run the recipe again, or verify the file by itself: graphprune verify {run / 'onnx'}",
            )
    model = load(folder, torch.float32)
    try:
        load_quantized_(model, run / "quant")
    except QuantError as error:
        raise SourceError(error.problem, error.remedy) from error
    return model.requires_grad_(False).eval()


def _of_onnx(file: Path, run: Path, recipe: Recipe) -> list[Check]:
    """Return the numbers of a file against the pruned ONNX model in its run folder, on inputs drawn at random."""
    source = run / PRUNED
    if not source.is_file():
        raise SourceError(
            f"there is no {source} to verify the ONNX model against",
            f"run it again, or verify the file by itself: graphprune verify {file}",
        )
    pruned = read_onnx(source)
    example = example_arrays(trace(source), pruned, recipe.seed)
    return measure_packed(file, pruned, quantized_by(recipe, pruned), [example])


def _windows(exported: Exported, recipe: Recipe, text: str | None) -> list[list[int]]:
    """Return the windows that the export stage verified with, or the like of another text."""
    documents = recipe_text(exported) if text is None else read_text(text)
    settings, data = recipe.export, recipe.data
    windows = cut_windows(
        documents,
        exported.tokenizer,
        window=data.evaluate_window,
        limit=min(data.evaluate_windows, settings.verify_windows),
        name=text or data.evaluate,
    )
    return [row[: settings.verify_tokens].tolist() for row in windows.ids]


def _adapter_checks(run: Path, model: nn.Module) -> list[Check]:
    """Return whether the adapter folder is of these packed weights, and how far its numbers are from theirs."""
    folder = run / "adapter"
    if not folder.is_dir():
        return []
    try:
        base = json.loads((folder / "graphprune.json").read_text(encoding="utf-8"))["base"]
        with (run / base["file"]).open("rb") as file:
            differs = hashlib.file_digest(file, "sha256").hexdigest() != base["sha256"]
        stored = load_file(folder / "adapter_model.safetensors")
        errors = [
            _distance(stored, name, module.scaling * module.lora_B @ module.lora_A)
            for name, module in model.named_modules()
            if isinstance(module, QuantLinear) and module.lora_A is not None and module.lora_B is not None
        ]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise VerificationError(
            f"{folder} is no adapter of this run: {error!r}", "run the recipe again"
        ) from error
    return [
        Check("adapter_of_another_base", float(differs), 0.0),
        Check("adapter", max(errors, default=0.0), _ROUNDING),
    ]


def _distance(stored: dict[str, Tensor], name: str, expected: Tensor) -> float:
    """Return how far a stored adapter's product is from another, over the largest number of that."""
    down, up = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((up @ down - expected).abs().max() / largest)
