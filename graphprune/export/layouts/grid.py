"""Evenly spaced levels of 2, 3, 4 and 8 bits, symmetric or affine: exact, and fast on a CPU."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.layouts.codes import stored_codes
from graphprune.export.layouts.matmul_n_bits import add_block_offsets, matmul_n_bits
from graphprune.export.layouts.registry import layout
from graphprune.export.layouts.scales import row_offsets, row_scales
from graphprune.export.packed_matrix import PackedMatrix

# Activations are rounded to int8 a block at a time: with 8-bit weights that error would dominate at 64.
LARGEST_BLOCK_8_BITS = 32


@layout("grid", fits=lambda weight: weight.even and weight.block() is not None)
def write_grid(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """MatMulNBits on the codes c of n levels: the kernel's code is ``c + 2^(bits - 1) - n // 2``.

    For n odd that is all; for n even it lacks half a step, which is added to the blocks' offsets.
    """
    block = grid_block(weight)
    y = matmul_n_bits(
        writer, x, grid_codes(writer, weight), grid_scales(writer, weight), weight, weight.bits, block
    )
    offsets = grid_offsets(writer, weight)
    return y if offsets is None else add_block_offsets(writer, y, x, offsets, weight, block)


def grid_block(weight: PackedMatrix) -> int:
    """Return the kernel block of a weight of evenly spaced levels.

    Raises:
        ExportError: If its levels are not, or no kernel block fits its rows.
    """
    block = weight.block(LARGEST_BLOCK_8_BITS) if weight.bits == 8 else weight.block()
    if block is None or not weight.even:
        raise ExportError(f"{weight.name}: not a grid, or no block fits its rows", "use another layout")
    return block


def grid_codes(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Return the kernel's codes, uint8 (out_features * in_features * bits / 8,)."""
    return stored_codes(writer, weight, 2 ** (weight.bits - 1) - len(weight.levels) // 2, low_first=True)


def grid_scales(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Return the distance of two levels, float32 (out_features, in_features / block)."""
    return row_scales(writer, weight, grid_block(weight), (len(weight.levels) - 1) / 2)


def grid_offsets(writer: GraphWriter, weight: PackedMatrix) -> ir.Value | None:
    """Return what the kernel's blocks lack, float32 (out_features, in_features / block); None if nothing."""
    levels = len(weight.levels)
    half_a_step = 0.0 if levels % 2 else 1 / (levels - 1)
    if weight.offsets is None and not half_a_step:
        return None
    return row_offsets(writer, weight, grid_block(weight), half_a_step)
