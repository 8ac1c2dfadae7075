"""Caches: what a model takes, appends to, reads, and gives back for the next call.

They are inputs and outputs of the file, but nobody outside reads them: their heads and widths may change together.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

# For operators that append to a cache by themselves: operand by result.
_CACHES: dict[tuple[str, str], dict[int, int]] = {
    ("", "Attention"): {1: 4, 2: 5},
    ("", "TensorScatter"): {0: 0},
    ("com.microsoft", "Attention"): {1: 4},
    ("com.microsoft", "GroupQueryAttention"): {1: 3, 2: 4},
    ("com.microsoft", "MultiHeadAttention"): {1: 6, 2: 7},
}


def states_of(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield pairs of a graph's input and output that are a cache before and after the call."""
    inputs = {value for value in graph.inputs if value.name not in graph.initializers}
    for output in graph.outputs:
        node = output.producer()
        if node is None:
            continue
        past = _appended(node, output) if node.op_type == "Concat" else _given_to(node, output)
        if past in inputs:
            yield past, output


def _given_to(node: ir.Node, output: ir.Value) -> ir.Value | None:
    """Return the cache that a fused operator returns as `output`."""
    position = _CACHES.get((node.domain, node.op_type), {}).get(output.index() or 0)
    return node.inputs[position] if position is not None and position < len(node.inputs) else None


def _appended(node: ir.Node, output: ir.Value) -> ir.Value | None:
    """Return the cache that a concatenation appends to: of open length, read by it alone, its result read further."""
    past, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    if past is None or past.shape is None or not output.uses() or not _is_read_by(node, past):
        return None
    is_open = -len(past.shape) <= axis < len(past.shape) and not isinstance(past.shape[axis], int)
    return past if is_open and not past.is_graph_output() else None


def _is_read_by(node: ir.Node, past: ir.Value) -> bool:
    """Whether nothing but a node reads the numbers of a cache; its sizes may be read elsewhere."""
    return all(use.node is node or use.node.op_type in ("Shape", "Size") for use in past.uses())
