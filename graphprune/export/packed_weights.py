"""The packed weights of a model as matrices, by the names that they have in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import torch
from torch import nn

from quant import PackedParameter, QuantEmbedding, QuantizedTensor, QuantLinear

Packed: TypeAlias = QuantLinear | QuantEmbedding | PackedParameter

# What `torch.nn.utils.parametrize` puts between a module's name and its parameter's, and behind that.
_PARAMETRIZED, _FIRST = "parametrizations.", ".0"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A packed matrix, alone or one of a stack.

    Attributes:
        label: What the names of its nodes begin with: its module's or its parameter's name, and its place in a stack.
        module: Name of the module that holds it.
        index: Its place in a stack; None for a matrix alone.
        quantized: (out_features, in_features).
    """

    label: str
    module: str
    index: int | None
    quantized: QuantizedTensor


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Yield the modules that hold packed weights, under each of their names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear | QuantEmbedding | PackedParameter):
            yield name, module


def packed_weights(model: nn.Module) -> Iterator[PackedWeight]:
    """Yield all packed matrices of a model."""
    for name, module in packed_modules(model):
        quantized = module.quantized
        if len(quantized.shape) < 3:
            yield PackedWeight(label=label_of(name), module=name, index=None, quantized=quantized)
            continue
        for index in range(quantized.shape[0]):
            label = f"{label_of(name)}.{index}"
            yield PackedWeight(label=label, module=name, index=index, quantized=of_stack(quantized, index))


def label_of(module: str) -> str:
    """Return the name of a packed module; of a packed parameter its own, without a last `.weight`."""
    return weight_name(module).removesuffix(".weight")


def weight_name(module: str) -> str:
    """Return the name of the parameter that a packed module stands for."""
    holder, found, parameter = module.rpartition(_PARAMETRIZED)
    return holder + parameter.removesuffix(_FIRST) if found else f"{module}.weight"


def matrix(
    module: Packed, shape: tuple[int, int] | None = None, *, index: int | None = None
) -> QuantizedTensor:
    """Return a packed weight as a matrix.

    Args:
        module: What holds it.
        shape: The matrix's shape, if it is not the weight's own.
        index: Which matrix of a stack; None for all of the weight.
    """
    if index is not None:
        return of_stack(module.quantized, index)
    return module.quantized if shape is None else replace(module.quantized, shape=shape)


def of_stack(quantized: QuantizedTensor, index: int) -> QuantizedTensor:
    """Return one matrix of a packed stack; it is whole blocks."""
    count, *matrix = quantized.shape
    row = replace(quantized, shape=(count, prod(matrix))).rows(torch.tensor([index]))
    return replace(row, shape=tuple(matrix))
