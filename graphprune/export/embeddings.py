"""The ONNX forms of a row look-up in a packed matrix: all exact, and of the same bytes as a tied head."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.export.graph_writer import MICROSOFT, GraphWriter
from graphprune.export.layouts import (
    byte_table,
    grid_block,
    grid_codes,
    grid_scales,
    unpacked,
)
from graphprune.export.packed_matrix import PackedMatrix


def write_embedding(writer: GraphWriter, ids: ir.Value, weight: PackedMatrix) -> ir.Value:
    """Add the nodes that compute `weight[ids]` and return their output.

    Only the rows asked for are unpacked, unless a row is not made of whole bytes and blocks: then a session
    unpacks the matrix when it loads the file.
    """
    if weight.block() is None or weight.offset is not None:
        return writer.node("Gather", [unpacked(writer, weight), ids], axis=0)
    if weight.grid is not None:
        return _block_quantized(writer, ids, weight)
    return _rows(writer, ids, weight)


def _block_quantized(writer: GraphWriter, ids: ir.Value, weight: PackedMatrix) -> ir.Value:
    return writer.node(
        "GatherBlockQuantized",
        [grid_codes(writer, weight), ids, grid_scales(writer, weight)],
        domain=MICROSOFT,
        bits=weight.bits,
        block_size=grid_block(weight),
        gather_axis=0,
        quantize_axis=1,
    )


def _rows(writer: GraphWriter, ids: ir.Value, weight: PackedMatrix) -> ir.Value:
    """Gather the rows' bytes and scales, look the bytes up in a table of float levels, and multiply."""
    block = weight.block() or 1
    codes = writer.initializer(f"{weight.name}.codes", weight.packed_high_first)
    matrix = writer.node("Reshape", [codes, writer.integers(weight.out_features, -1)])
    rows = writer.node("Cast", [writer.node("Gather", [matrix, ids], axis=0)], to=ir.DataType.INT32.value)
    table = byte_table(writer, weight, weight.levels, "table.float")
    levels = writer.node("Gather", [table, rows], axis=0)  # (..., bytes, weights a byte)
    blocked = writer.node("Reshape", [levels, writer.integers(0, 0, -1, block)])
    scales = writer.initializer(f"{weight.name}.row_scales", lambda: weight.row_scales(block))
    row_scales = writer.node("Unsqueeze", [writer.node("Gather", [scales, ids], axis=0), writer.integers(-1)])
    scaled = writer.node("Mul", [blocked, row_scales])
    return writer.node("Reshape", [scaled, writer.integers(0, 0, weight.in_features)])
