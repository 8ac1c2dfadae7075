"""Whether a file's packed weights are the model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.errors import VerificationError
from graphprune.export.file_weights import file_weights
from graphprune.export.layouts import rounded_levels
from graphprune.export.packed_weights import PackedWeight, packed_weights
from quant import PackedParameter, QuantizedTensor, QuantLinear, get_format

# A weight is one product of float32 numbers, in another order: a few units in the last place of absmax.
WEIGHT_TOLERANCE = 5e-7


def compare_weights(path: Path, model: nn.Module) -> tuple[dict[str, float], dict[str, nn.Module]]:
    """Compare the file's packed weights with the model's; return also modules that hold rounded ones.

    The errors are relative to each weight's absmax.

    Raises:
        VerificationError: If the file holds a weight that the model does not have.
    """
    packed = {weight.label: weight for weight in packed_weights(model)}
    errors: list[float] = []
    roundings: list[float] = []
    rounded: dict[str, nn.Module] = {}
    for label, found in file_weights(path):
        expected = packed.get(label)
        if expected is None or tuple(found.shape) != expected.quantized.shape:
            raise VerificationError(
                f"{path} holds a {tuple(found.shape)} weight for {label}, which the model does not have",
                "verify with the very model that was exported",
            )
        weight = torch.from_numpy(found)
        exact = relative_to_absmax(weight - expected.quantized.dequantize(), expected.quantized)
        roundings.append(exact)
        if exact <= WEIGHT_TOLERANCE:
            errors.append(exact)
        else:
            with_rounded = with_rounded_levels(expected.quantized)
            errors.append(relative_to_absmax(weight - with_rounded, expected.quantized))
            _hold(rounded, model, expected, weight)
    # numpy's maximum is nan if any number is; Python's is not.
    checks = {"weights": float(np.max(errors)), "weight_rounding": float(np.max(roundings))} if errors else {}
    return checks, rounded


def _hold(rounded: dict[str, nn.Module], model: nn.Module, packed: PackedWeight, weight: Tensor) -> None:
    """Let a module hold the weight, or a stack of which the other matrices are as they were."""
    original = model.get_submodule(packed.module)
    if not isinstance(original, PackedParameter):
        rounded[packed.module] = _HeldWeight(weight, original)
        return
    held = rounded.setdefault(packed.module, _HeldParameter(original))
    if isinstance(held, _HeldParameter):
        held.put(weight, packed.index)


class _HeldWeight(nn.Module):
    """What a quantized module computes with another dense weight in the place of its packed one."""

    weight: Tensor

    def __init__(self, weight: Tensor, original: nn.Module) -> None:
        super().__init__()
        self.embeds = not isinstance(original, QuantLinear)
        self.bias = original.bias if isinstance(original, QuantLinear) else None
        if isinstance(original, QuantLinear) and original.lora_A is not None and original.lora_B is not None:
            weight = weight + original.scaling * (original.lora_B @ original.lora_A)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.embeds:
            return functional.embedding(x, self.weight)
        return functional.linear(x, self.weight, self.bias)


class _HeldParameter(nn.Module):
    """A packed parameter with other dense matrices in the place of its packed ones."""

    def __init__(self, original: PackedParameter) -> None:
        super().__init__()
        self.original = original
        self.dense = original.quantized.dequantize()

    def put(self, weight: Tensor, index: int | None) -> None:
        """Hold a matrix at its place in the stack, or alone."""
        self.dense[... if index is None else index] = weight

    def forward(self, original: Tensor) -> Tensor:
        weight, packed = self.dense, self.original
        if packed.lora_A is not None and packed.lora_B is not None:
            weight = weight + packed.scaling * (packed.lora_B @ packed.lora_A)
        return weight.mT if packed.transposed else weight


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
