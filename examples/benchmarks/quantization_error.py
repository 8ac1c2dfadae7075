"""Errors of formats and of LoftQ, without and with calibration text, on Gaussian weights and on a real model.

    python examples/benchmarks/quantization_error.py                  # the demo model, SmolLM2-135M-Instruct
    python examples/benchmarks/quantization_error.py --model FOLDER

*weight* is ``||W - Q - B A|| / ||W||``, *output* is ``||X (W - Q - B A)^T|| / ||X W^T||`` on text that was not
calibrated on; for a model both are root mean squares over its linear layers. Calibration: windows of
``examples/data/wikipedia.jsonl``; measured on windows of ``examples/data/wikitext2.jsonl``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import quant
from graphprune.source.demo import demo_folder
from graphprune.source.text import cut_windows, read_text
from quant.loftq import relative_error

DATA = Path(__file__).parents[1] / "data"
FORMATS = ["nf4", "uint3", "nf2", "uint2"]


def gaussian_formats() -> Table:
    """Every format on one Gaussian matrix, with the scale that covers each block and with the fitted one."""
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    table = Table(
        "format", "bits", "stored bits, float32 scales", "double", "error, covering scale", "fitted", "default",
        "its error, double",
        title="Gaussian 2048 x 1024, blocks of 64, seed 0",
    )  # fmt: skip
    for name in quant.format_names():
        format = quant.get_format(name)
        plain, double = (
            quant.quantize(weight, name, scale_storage=storage) for storage in ("float32", "double")
        )
        errors = [
            relative_error(weight, quant.quantize(weight, name, fitted=fitted).dequantize())
            for fitted in (False, True)
        ]
        bits = [f"{8 * packed.nbytes / weight.numel():.3f}" for packed in (plain, double)]
        default = "fitted" if format.fitted else "covering"
        errors.append(relative_error(weight, double.dequantize()))
        covering, fitted, doubled = (f"{error:.4f}" for error in errors)
        table.add_row(name, str(format.bits), *bits, covering, fitted, default, doubled)
    return table


def stored_shares(rank: int) -> Table:
    """What a layer with adapters takes of its bytes in float16."""
    shapes = [(576, 1536), (4096, 4096), (4096, 11008)]
    table = Table(
        "format",
        "scales",
        *(f"{rows} x {columns}" for rows, columns in shapes),
        title=f"bytes over float16's, with float32 adapters of rank {rank}",
    )
    for format in ("nf4", "uint3", "uint2", "lloyd2"):
        for storage in ("float32", "double"):
            shares = []
            for rows, columns in shapes:
                packed = quant.quantize(torch.ones(rows, columns), format, scale_storage=storage)
                shares.append((packed.nbytes + 4 * rank * (rows + columns)) / (2 * rows * columns))
            table.add_row(format, storage, *(f"{share:.1%}" for share in shares))
    return table


def variants(covariance: Tensor | None) -> dict[str, dict[str, Any]]:
    """The ways to quantize that are compared, as arguments of `quant.loftq`."""
    ways: dict[str, dict[str, Any]] = {"QLoRA": {"iterations": 0}, "LoftQ": {"iterations": 5}}
    if covariance is not None:
        ways["closed-form adapters"] = {"iterations": 1, "covariance": covariance, "compensated": False}
        ways["and compensated rounding"] = {"iterations": 3, "covariance": covariance}
    return ways


def errors(weight: Tensor, held_out: quant.InputNorm, found: quant.LoftQResult) -> tuple[float, float]:
    """Return the relative errors of weight and outputs."""
    missing = weight - found.quantized.dequantize() - found.lora_B @ found.lora_A
    return float(missing.norm() / weight.norm()), held_out.error(missing) / held_out.error(weight)


def layer_table(title: str, layers: Iterable[tuple[str, Tensor, Tensor, Tensor]], rank: int) -> Table:
    """Compare the variants on layers, given as name, weight, covariance to fit, and covariance to measure."""
    sums: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _, weight, fit, measure in layers:
        held_out = quant.InputNorm.of(measure, damping=1e-6)
        norm = quant.InputNorm.of(fit)
        for format in FORMATS:
            for way, arguments in variants(norm).items():  # type: ignore[arg-type]
                found = quant.loftq(weight, format, rank, **arguments)
                sums.setdefault((format, way), []).append(errors(weight, held_out, found))
    table = Table("format", "way", "weight", "output", title=title)
    for (format, way), found_errors in sums.items():
        weight_error, output_error = (
            math.sqrt(sum(pair[i] ** 2 for pair in found_errors) / len(found_errors)) for i in (0, 1)
        )
        table.add_row(format, way, f"{weight_error:.4f}", f"{output_error:.4f}")
    return table


def gaussian_layers() -> Iterable[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield one Gaussian weight whose inputs have a spectrum that falls by two decades."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator)
    mixing = (
        torch.linalg.qr(torch.randn(1024, 1024, generator=generator)).Q * torch.logspace(0, -1, 1024)[:, None]
    )
    fit, measure = (torch.randn(8192, 1024, generator=generator) @ mixing for _ in range(2))
    yield "gaussian", weight, fit.T @ fit / len(fit), measure.T @ measure / len(measure)


def model_layers(folder: Path, windows: int, every: int) -> Iterable[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield every linear layer of a model but its head, or each of so many."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    layers = dict(list(layers.items())[::every])
    fit, measure = (
        quant.collect_covariances(
            model,
            cut_windows(
                read_text(str(DATA / file)), tokenizer, window=512, limit=windows, name=file
            ).ids.split(4),
            layers,
        )
        for file in ("wikipedia.jsonl", "wikitext2.jsonl")
    )
    for name, layer in layers.items():
        yield name, layer.weight.detach(), fit[name], measure[name]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="transformers folder; the demo model without it")
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, to fit and to measure")
    parser.add_argument(
        "--every", type=int, default=1, help="take each n-th layer; no multiple of the layers of a block"
    )
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(gaussian_formats())
    console.print(stored_shares(arguments.rank))
    title = f"rank {arguments.rank}, blocks of 64"
    console.print(
        layer_table(f"Gaussian 1024 x 1024, correlated inputs, {title}", gaussian_layers(), arguments.rank)
    )
    folder = arguments.model or demo_folder()
    layers = model_layers(folder, arguments.windows, arguments.every)
    which = "every linear layer" if arguments.every == 1 else f"each {arguments.every}th linear layer"
    console.print(layer_table(f"{which} of {folder.name}, {title}", layers, arguments.rank))


if __name__ == "__main__":
    main()
