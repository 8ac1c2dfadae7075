"""Attention as one operator takes it: heads side by side in the last axis, and the cache among its inputs.

The tracer leaves a reshape and a transpose at each of query, key, value and result, and a concatenation at each half of
the cache. ONNX's Attention and RotaryEmbedding do all of that by themselves, and faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphprune.export.graph_writer import GraphWriter

_HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True, slots=True)
class _Cached:
    """Half of a cache: ``whole`` is ``past`` and then ``new``, (batch, heads, tokens, head size)."""

    past: ir.Value
    new: ir.Value
    whole: ir.Value


def fuse_attention(graph: ir.Graph) -> None:
    """Rewrite every Attention of a graph whose values still have shapes; what does not fit stays as it is."""
    for node in [node for node in graph if node.op_type == "Attention" and node.domain == ""]:
        _take_flat_heads(graph, _take_in_cache(graph, node))


def _take_in_cache(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """Return the node with past keys and values among its inputs, and with all of them among its outputs."""
    halves = [half for value in node.inputs[1:3] if (half := _cached(value, node)) is not None]
    if len(halves) != 2 or len(node.outputs) != 1 or _is_causal(node):
        return node
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    inputs = [node.inputs[0], *(half.new for half in halves), mask, *(half.past for half in halves)]
    fused = ir.Node("", "Attention", inputs, node.attributes.values(), num_outputs=3, name=node.name)
    joins = [join for half in halves if (join := half.whole.producer()) is not None]
    ir.convenience.replace_nodes_and_values(
        graph,
        insertion_point=node,
        old_nodes=[node, *joins],
        new_nodes=[fused],
        old_values=[node.outputs[0], *(half.whole for half in halves)],
        new_values=fused.outputs,
    )
    return fused


def _is_causal(node: ir.Node) -> bool:
    return "is_causal" in node.attributes and bool(node.attributes["is_causal"].as_int())


def _cached(value: ir.Value | None, reader: ir.Node) -> _Cached | None:
    """Return the halves of keys or values that nobody but `reader` and the caller sees, who both must.

    ONNX Runtime gives up on an Attention that reads past keys and whose outputs of all keys nobody wants.
    """
    node = _producer(value, "Concat")
    if (
        value is None
        or node is None
        or len(node.inputs) != 2
        or node.attributes["axis"].as_int() not in (-2, 2)
    ):
        return None
    past, new = node.inputs
    if past is None or new is None or not past.is_graph_input() or not value.is_graph_output():
        return None
    return _Cached(past, new, value) if {use.node for use in value.uses()} == {reader} else None


def _take_flat_heads(graph: ir.Graph, node: ir.Node) -> None:
    """Let the node read and write (batch, tokens, heads x head size), if its neighbours do nothing else in between."""
    result = node.outputs[0]
    merged = _merged(result)
    read = [value for value in node.inputs[:3] if value is not None and _splits_heads(value)]
    if not merged or len(read) != 3:
        return
    writer = GraphWriter(graph)
    writer.begin(node.name or f"{result.name}/heads")
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", _heads(read[0])[0])
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", _heads(read[1])[0])
    for index, value in enumerate(read):
        node.replace_input_with(index, _flat(writer, value))
    writer.insert_before(node)
    result.shape = merged[0].shape
    ir.convenience.replace_all_uses_with(merged, [result] * len(merged), replace_graph_outputs=True)


def _splits_heads(value: ir.Value) -> bool:
    """Return whether a value (batch, heads, tokens, head size) is another one transposed, and then perhaps rotated."""
    rotated = _producer(value, "RotaryEmbedding")
    if rotated is None:
        return _heads_last(value) is not None
    inner = rotated.inputs[0]
    return inner is not None and len(value.uses()) == 1 and _splits_heads(inner)


def _flat(writer: GraphWriter, value: ir.Value) -> ir.Value:
    """Return what `_splits_heads` holds for as (batch, tokens, heads x head size)."""
    rotated = _producer(value, "RotaryEmbedding")
    if rotated is not None and rotated.inputs[0] is not None:
        inner = rotated.inputs[0]
        attributes: dict[str, Any] = {**rotated.attributes, "num_heads": _heads(inner)[0]}
        return writer.node("RotaryEmbedding", [_flat(writer, inner), *rotated.inputs[1:]], **attributes)
    heads_last = _heads_last(value) or value
    split = _producer(heads_last, "Reshape")
    before = split.inputs[0] if split is not None else None
    if before is not None and _joins_heads(before, heads_last):
        return before
    return writer.node("Reshape", [heads_last, writer.integers(0, 0, math.prod(_heads(value)))])


def _heads_last(value: ir.Value) -> ir.Value | None:
    """Return (batch, tokens, heads, head size) where a value is that, transposed."""
    node = _producer(value, "Transpose")
    turned = node is not None and node.attributes["perm"].as_ints() == _HEADS_FIRST
    return node.inputs[0] if node is not None and turned and all(_heads(value)) else None


def _merged(result: ir.Value) -> list[ir.Value]:
    """Return all that is read of a result (batch, heads, tokens, head size), if each joins the heads again."""
    found: list[ir.Value] = []
    for use in result.uses():
        heads_last = use.node.outputs[0]
        if use.node.op_type != "Transpose" or use.node.attributes["perm"].as_ints() != _HEADS_FIRST:
            return []
        for reader, _ in heads_last.uses():
            joined = reader.outputs[0]
            if (
                reader.op_type != "Reshape"
                or joined.is_graph_output()
                or not _joins_heads(joined, heads_last)
            ):
                return []
            found.append(joined)
    return found


def _joins_heads(joined: ir.Value, split: ir.Value) -> bool:
    """Return whether (batch, tokens, heads x head size) is what a value is of (batch, tokens, heads, head size)."""
    if joined.shape is None or split.shape is None or len(joined.shape) != 3 or len(split.shape) != 4:
        return False
    tokens, (heads, size) = list(split.shape[:2]), split.shape[2:]
    if not isinstance(heads, int) or not isinstance(size, int) or ir.SymbolicDim(None) in tokens:
        return False
    return list(joined.shape) == [*tokens, heads * size]


def _heads(value: ir.Value) -> tuple[int, int]:
    """Return (heads, head size) of a value (batch, heads, tokens, head size); zeros if they are not known."""
    shape = value.shape
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return 0, 0
    return shape[1], shape[3]


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator and node.domain == "" else None
