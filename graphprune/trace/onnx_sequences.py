"""Splits that go through a sequence, as exporters write them, in the form that has a result for each piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.trace.onnx_shapes import numbers_of


def without_sequences(model: ir.Model) -> ir.Model:
    """Turn each ``SplitToSequence`` that ``SequenceAt`` reads at known positions into a ``Split``.

    Left as they are: those whose pieces cannot be counted, and those that any other operator reads.

    Args:
        model: The model; it is not changed.

    Returns:
        A changed copy, or the model itself if it has no such operator.
    """
    if not any(_is(node, "SplitToSequence") for node in model.graph):
        return model
    changed = model.clone()
    for node in list(changed.graph):
        if _is(node, "SplitToSequence"):
            _name_pieces(changed.graph, node)
    return changed


def _name_pieces(graph: ir.Graph, node: ir.Node) -> None:
    """Give a node a result for each piece, which its readers pass on; do nothing if that cannot be told."""
    sizes, readers = _sizes(node), _readers(node.outputs[0])
    if not sizes or readers is None or not all(-len(sizes) <= at < len(sizes) for at in readers.values()):
        return
    name, axis = node.outputs[0].name, node.attributes.get_int("axis", 0)
    squeezed = not _has_sizes(node) and not node.attributes.get_int("keepdims", 1)
    node.op_type = "Split"
    node.attributes.pop("keepdims", None)
    node.resize_inputs(2)
    node.replace_input_with(1, _integers(graph, node, f"{name}_sizes", sizes))
    node.resize_outputs(len(sizes))
    for position, piece in enumerate(node.outputs):
        piece.name, piece.type, piece.shape = f"{name}_{position}", None, None
    for reader, at in readers.items():
        reader.op_type = "Squeeze" if squeezed else "Identity"
        reader.replace_input_with(0, node.outputs[at])
        if squeezed:
            reader.replace_input_with(1, _integers(graph, reader, f"{reader.outputs[0].name}_axis", [axis]))
        else:
            reader.resize_inputs(1)


def _sizes(node: ir.Node) -> list[int] | None:
    """Return the sizes of the pieces, or None if they are not known."""
    given = _constant(node.inputs[1]) if _has_sizes(node) else np.array(1)
    if given is None or given.ndim == 1:
        return None if given is None else given.tolist()
    source, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    if source is None or source.shape is None or not -len(source.shape) <= axis < len(source.shape):
        return None
    whole, step = source.shape[axis], int(given)
    if not isinstance(whole, int) or step < 1:
        return None
    return [min(step, whole - start) for start in range(0, whole, step)]


def _has_sizes(node: ir.Node) -> bool:
    return len(node.inputs) > 1 and node.inputs[1] is not None


def _readers(sequence: ir.Value) -> dict[ir.Node, int] | None:
    """Return who reads a sequence, and at which position; None if anything else is done with it."""
    positions = {
        use.node: _constant(use.node.inputs[1]) if _is(use.node, "SequenceAt") else None
        for use in sequence.uses()
    }
    known = {node: int(position) for node, position in positions.items() if position is not None}
    return known if len(known) == len(positions) and not sequence.is_graph_output() else None


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if value is None or tensor is None else numbers_of(value.name or "", tensor)


def _integers(graph: ir.Graph, before: ir.Node, name: str, numbers: list[int]) -> ir.Value:
    """Insert a constant."""
    node = ir.node("Constant", [], {"value_ints": numbers}, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in ("", "ai.onnx")
