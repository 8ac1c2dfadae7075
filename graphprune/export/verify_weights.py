"""Whether a file's packed weights are the model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.errors import VerificationError
from graphprune.export.file_weights import file_weights
from graphprune.export.layouts import rounded_levels
from quant import QuantEmbedding, QuantizedTensor, QuantLinear, get_format

# A weight is one product of float32 numbers, in another order: a few units in the last place of absmax.
WEIGHT_TOLERANCE = 5e-7


def compare_weights(path: Path, model: nn.Module) -> tuple[dict[str, float], dict[str, nn.Module]]:
    """Compare the file's packed weights with the model's; return also modules that hold rounded ones.

    The errors are relative to each weight's absmax.

    Raises:
        VerificationError: If the file holds a weight that the model does not have.
    """
    modules = dict(_quantized_modules(model))
    errors: list[float] = []
    roundings: list[float] = []
    rounded: dict[str, nn.Module] = {}
    for name, found in file_weights(path):
        module = modules.get(name)
        if module is None or tuple(found.shape) != module.quantized.shape:
            raise VerificationError(
                f"{path} holds a {tuple(found.shape)} weight for {name}, which the model does not have",
                "verify with the very model that was exported",
            )
        weight = torch.from_numpy(found)
        exact = relative_to_absmax(weight - module.quantized.dequantize(), module.quantized)
        roundings.append(exact)
        if exact <= WEIGHT_TOLERANCE:
            errors.append(exact)
        else:
            expected = with_rounded_levels(module.quantized)
            errors.append(relative_to_absmax(weight - expected, module.quantized))
            rounded[name] = _HeldWeight(weight, module)
    # numpy's maximum is nan if any number is; Python's is not.
    checks = {"weights": float(np.max(errors)), "weight_rounding": float(np.max(roundings))} if errors else {}
    return checks, rounded


class _HeldWeight(nn.Module):
    """A quantized module with another dense weight in the place of its packed one."""

    weight: Tensor

    def __init__(self, weight: Tensor, original: QuantLinear | QuantEmbedding) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.original, QuantEmbedding):
            return functional.embedding(x, self.weight)
        y = functional.linear(x, self.weight, self.original.bias)
        if self.original.lora_A is None or self.original.lora_B is None:
            return y
        return y + self.original.scaling * (x @ self.original.lora_A.T) @ self.original.lora_B.T


def _quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantLinear | QuantEmbedding]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear | QuantEmbedding):
            yield name, module


def with_rounded_levels(quantized: QuantizedTensor) -> Tensor:
    """Dequantize with the levels that an 8-bit grid has nearest to the format's own."""
    levels = torch.from_numpy(rounded_levels(get_format(quantized.format).levels.numpy()))
    return levels[quantized.unpacked_codes().long()] * _of_each(quantized, quantized.absmax)


def relative_to_absmax(difference: Tensor, quantized: QuantizedTensor) -> float:
    """Return the largest difference over its block's absmax, in affine formats over absmax and offset together."""
    size = _of_each(quantized, quantized.absmax)
    if quantized.offsets is not None:
        size = size + _of_each(quantized, quantized.offsets.values().abs())
    return float((difference.abs() / size.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _of_each(quantized: QuantizedTensor, blocks: Tensor) -> Tensor:
    rows, columns = quantized.shape
    return blocks.repeat_interleave(quantized.block_size)[: rows * columns].view(rows, columns)
