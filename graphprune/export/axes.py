"""Which axes of a model's inputs are free, and their names: axes of one name have one size."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TypeAlias

import onnx_ir as ir
from torch import Tensor

from graphprune.errors import ExportError, TraceWarning
from graphprune.trace.inputs import open_sizes

BATCH = "batch_size"
SEQUENCE = "sequence_length"

DynamicAxes: TypeAlias = Mapping[str, Mapping[int, str]]
"""Of each input the free axes by name: ``{"pixel_values": {0: "batch_size", 2: "height"}}``."""

_DEFAULTS = (BATCH, SEQUENCE)
_SYMBOL = re.compile(r"\bs\d+\b")  # how torch.export names a size


def guessed_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Leave the batch open, and the sequence of integers and of (batch, sequence, width).

    Axes that have one size in the example get one name. The first are `batch_size` and `sequence_length`; other sizes
    are named after their input, unless they are 1, which is a size that is spread over a whole batch.
    """
    names: dict[tuple[int, int], str] = {}
    free: dict[str, dict[int, str]] = {}
    for name, sizes in open_sizes(dict(inputs)).items():
        free[name] = {}
        for axis in sizes:
            size = inputs[name].shape[axis]
            taken = _DEFAULTS[axis] in names.values()
            if taken and size == 1 and (axis, size) not in names:
                continue
            new = f"{name}_{_DEFAULTS[axis]}" if taken else _DEFAULTS[axis]
            free[name][axis] = names.setdefault((axis, size), new)
    return free


def checked_axes(inputs: Mapping[str, Tensor], asked: DynamicAxes) -> dict[str, dict[int, str]]:
    """Return the axes that a user names, each counted from the front.

    Raises:
        ExportError: If there is no such input or axis, or the example has two sizes for one name.
    """
    sizes: dict[str, int] = {}
    free: dict[str, dict[int, str]] = {name: {} for name in inputs}
    for name, axes in asked.items():
        if name not in inputs:
            raise ExportError(
                f"dynamic_axes names the input {name!r}, which is no tensor of the examples",
                f"name one of {', '.join(inputs)}",
            )
        shape = inputs[name].shape
        for axis, symbol in axes.items():
            if not -len(shape) <= axis < len(shape):
                raise ExportError(
                    f"dynamic_axes opens axis {axis} of {name}, whose shape is {tuple(shape)}",
                    f"give an axis from 0 to {len(shape) - 1}",
                )
            if sizes.setdefault(symbol, shape[axis]) != shape[axis]:
                raise ExportError(
                    f"{symbol} is {sizes[symbol]} and, on axis {axis} of {name}, {shape[axis]} in the examples",
                    "give axes that may differ different names",
                )
            free[name][axis % len(shape)] = symbol
    return free


def widened(inputs: Mapping[str, Tensor], free: DynamicAxes) -> dict[str, Tensor]:
    """Repeat what is 1 along a free axis: the tracer takes a size of 1 for one that never changes."""
    wide = dict(inputs)
    for name, axes in free.items():
        for axis in axes:
            if wide[name].shape[axis] == 1:
                wide[name] = wide[name].repeat_interleave(2, axis)
    return wide


def name_symbols(graph: ir.Graph, free: DynamicAxes, *, required: bool) -> None:
    """Give the free axes of a traced graph their names, in its inputs and all that follows from them in its outputs.

    Args:
        graph: As it was traced.
        free: The names.
        required: Whether an axis that the model fixes is an error; otherwise a `TraceWarning` tells of it where it
            is a batch or a sequence of tokens.

    Raises:
        ExportError: If the model fixes a required axis.
    """
    symbols: dict[str, str] = {}
    fixed: list[str] = []
    for value in graph.inputs:
        axes, shape = free.get(str(value.name), {}), value.shape
        if shape is None:
            continue
        for axis, name in axes.items():
            size = shape[axis]
            if isinstance(size, ir.SymbolicDim):
                symbols.setdefault(str(size.value), name)
            elif required or axis == 0 or not value.dtype or not value.dtype.is_floating_point():
                fixed.append(f"{value.name} axis {axis} is {size}")
    if fixed and required:
        raise ExportError(
            f"the model takes only sizes of the example: {'; '.join(fixed)}",
            "leave these out of dynamic_axes, or trace with an example of the size that you need",
        )
    if fixed:
        warnings.warn(
            f"exported for the example's sizes alone: {'; '.join(fixed)}", TraceWarning, stacklevel=5
        )
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, symbols) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return _SYMBOL.sub(lambda found: symbols.get(found[0], found[0]), str(size.value))
