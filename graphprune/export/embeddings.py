"""The ONNX forms of a row look-up in a packed matrix: all exact, and of the same bytes as a tied head."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.export.graph_writer import MICROSOFT, GraphWriter
from graphprune.export.layouts.codes import as_indices, byte_table, codebook_codes
from graphprune.export.layouts.grid import grid_block, grid_codes, grid_offsets, grid_scales
from graphprune.export.layouts.registry import Profile
from graphprune.export.layouts.scales import row_offsets, row_scales
from graphprune.export.layouts.unpacked import unpacked
from graphprune.export.packed_matrix import PackedMatrix


def write_embedding(
    writer: GraphWriter, ids: ir.Value, weight: PackedMatrix, profile: Profile = "cpu"
) -> ir.Value:
    """Add the nodes that compute `weight[ids]` and return their output.

    Only the rows asked for are unpacked, unless a row is not made of whole bytes and blocks: then a session
    unpacks the matrix when it loads the file.
    """
    if weight.block() is None:
        return writer.node("Gather", [unpacked(writer, weight), ids], axis=0)
    if weight.even and profile != "portable":
        return _block_quantized(writer, ids, weight)
    return _rows(writer, ids, weight)


def _block_quantized(writer: GraphWriter, ids: ir.Value, weight: PackedMatrix) -> ir.Value:
    shape = writer.integers(weight.out_features, weight.in_features * weight.bits // 8)
    codes = writer.node("Reshape", [grid_codes(writer, weight), shape])
    block = grid_block(weight)
    rows = writer.node(
        "GatherBlockQuantized",
        [codes, ids, grid_scales(writer, weight)],
        domain=MICROSOFT,
        bits=weight.bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    offsets = grid_offsets(writer, weight)
    if offsets is None:
        return rows
    return _joined(writer, "Add", _in_blocks(writer, rows, block), offsets, ids, weight)


def _rows(writer: GraphWriter, ids: ir.Value, weight: PackedMatrix) -> ir.Value:
    """Gather the rows' bytes and scales, look the bytes up in a table of float levels, and multiply."""
    block = weight.block() or 1
    matrix = writer.node(
        "Reshape", [codebook_codes(writer, weight), writer.integers(weight.out_features, -1)]
    )
    rows = as_indices(writer, writer.node("Gather", [matrix, ids], axis=0))
    table = byte_table(writer, weight, weight.levels, "table.float")
    levels = writer.node("Gather", [table, rows], axis=0)  # (..., bytes, weights a byte)
    scaled = _joined(
        writer, "Mul", _in_blocks(writer, levels, block), row_scales(writer, weight, block), ids, weight
    )
    if weight.offsets is None:
        return scaled
    offsets = row_offsets(writer, weight, block)
    return _joined(writer, "Add", _in_blocks(writer, scaled, block), offsets, ids, weight)


def _in_blocks(writer: GraphWriter, rows: ir.Value, block: int) -> ir.Value:
    return writer.node("Reshape", [rows, writer.integers(0, 0, -1, block)])


def _joined(
    writer: GraphWriter,
    operator: str,
    blocks: ir.Value,
    numbers: ir.Value,
    ids: ir.Value,
    weight: PackedMatrix,
) -> ir.Value:
    """Join each row's blocks with its numbers (rows, blocks), and return whole rows."""
    each = writer.node("Unsqueeze", [writer.node("Gather", [numbers, ids], axis=0), writer.integers(-1)])
    joined = writer.node(operator, [blocks, each])
    return writer.node("Reshape", [joined, writer.integers(0, 0, weight.in_features)])
