"""Rotary angles that are the same for all texts of a batch, spread over it: ONNX's RotaryEmbedding broadcasts none."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.export.graph_writer import GraphWriter


def spread_angles(graph: ir.Graph) -> None:
    """Give every RotaryEmbedding one row of cosines and sines a text, while shapes are known.

    Without position ids as an input, positions are counted once, and their angles have a batch of 1.
    """
    spread: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "RotaryEmbedding" and node.domain == ""]:
        rotated = node.inputs[0]
        if rotated is None or rotated.shape is None or rotated.shape[0] == 1 or len(node.inputs) != 3:
            continue
        for index, angles in enumerate(node.inputs[1:], start=1):
            if angles is None or not _is_shared(angles):
                continue
            if angles not in spread:
                spread[angles] = _expanded(graph, node, rotated, angles)
            node.replace_input_with(index, spread[angles])


def _is_shared(angles: ir.Value) -> bool:
    """Whether cosines or sines are of one row for all texts; they have the shape of what they are computed from."""
    producer = angles.producer()
    source = angles if angles.shape is not None or producer is None else producer.inputs[0]
    return source is not None and source.shape is not None and len(source.shape) == 3 and source.shape[0] == 1


def _expanded(graph: ir.Graph, node: ir.Node, rotated: ir.Value, angles: ir.Value) -> ir.Value:
    writer = GraphWriter(graph)
    writer.begin(f"{angles.name}/spread")
    batch = writer.node("Shape", [rotated], start=0, end=1)
    sizes = writer.node("Concat", [batch, writer.integers(1, 1)], axis=0)
    expanded = writer.node("Expand", [angles, sizes])
    writer.insert_before(node)
    return expanded
