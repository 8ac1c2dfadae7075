"""Selections applied to the numbers in an ONNX graph: slicing and zeroing along every axis that a group reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.shrink.weights import changed_axes, removed_indices
from graphprune.trace.onnx_shapes import numbers_of


def cut_weights(model: ir.Model, groups: NodeGroups, kept: Mapping[str, Indices]) -> None:
    """Keep of each weight only the units that stay, in place.

    Args:
        model: A copy of the graph that `groups` were read off.
        groups: Its node groups.
        kept: Units that stay, in their new order, by group name.
    """
    for name, value in _weights(model, groups):
        axes = changed_axes(name, groups, kept)
        if axes:
            numbers = numbers_in(value)
            for axis, indices in axes.items():
                numbers = np.take(numbers, indices, axis=axis)
            set_numbers(value, numbers)


def zero_weights(model: ir.Model, groups: NodeGroups, kept: Mapping[str, Indices]) -> None:
    """Set to zero, in place, what belongs to a removed unit, as the groups' members name it.

    Args:
        model: A copy of the graph that `groups` were read off.
        groups: Its node groups.
        kept: Units that stay, by group name.
    """
    for name, value in _weights(model, groups):
        gone = removed_indices(name, groups, kept)
        if gone:
            numbers = numbers_in(value).copy()
            for axis, indices in gone.items():
                np.moveaxis(numbers, axis, 0)[indices] = 0
            set_numbers(value, numbers)


def numbers_in(value: ir.Value) -> NDArray[Any]:
    """Return the numbers of an initializer, or of a Constant node's result.

    Raises:
        TraceError: If they lie in a file that cannot be read.
    """
    tensor = ir.convenience.get_const_tensor(value)
    return np.empty(0) if tensor is None else numbers_of(value.name or "", tensor)


def set_numbers(value: ir.Value, numbers: NDArray[Any]) -> None:
    """Give an initializer, or a Constant node's result, other numbers of the type that it has."""
    old = ir.convenience.get_const_tensor(value)
    tensor = ir.tensor(np.ascontiguousarray(numbers), dtype=old.dtype if old else None, name=value.name)
    node = value.producer()
    if node is not None:
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
    value.const_value, value.shape, value.dtype = tensor, ir.Shape(numbers.shape), tensor.dtype


def held_values(model: ir.Model) -> dict[str, ir.Value]:
    """Return what a graph holds numbers of, by name: initializers and the results of Constant nodes."""
    made = {node.outputs[0].name or "": node.outputs[0] for node in model.graph if node.op_type == "Constant"}
    return {**made, **model.graph.initializers}


def _weights(model: ir.Model, groups: NodeGroups) -> Iterator[tuple[str, ir.Value]]:
    """Yield the weights that a graph holds, by name."""
    held = held_values(model)
    yield from ((name, held[name]) for name in groups.graph.weights if name in held)
