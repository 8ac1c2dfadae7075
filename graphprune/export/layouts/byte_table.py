"""Codebooks of up to 4 bits on an 8-bit kernel: their levels rounded to a grid, fast on a CPU."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.layouts.codes import expanded
from graphprune.export.layouts.matmul_n_bits import matmul_n_bits
from graphprune.export.layouts.registry import layout
from graphprune.export.layouts.scales import row_scales
from graphprune.export.packed_matrix import PackedMatrix


def holds_levels(weight: PackedMatrix) -> bool:
    """Return whether the levels are multiples of the grid's step, as FP4's are."""
    return bool(np.array_equal(rounded_levels(weight.levels), weight.levels))


@layout(
    "byte_table",
    exact=holds_levels,
    fits=lambda weight: weight.offsets is None and weight.bits < 8 and weight.block() is not None,
)
def write_byte_table(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """MatMulNBits on 8-bit codes that a session makes of the packed ones when it loads the file.

    Each packed byte is an index into a table of the 8-bit codes of its 2 or 4 weights.
    """
    block = weight.block()
    if block is None:
        raise ExportError(f"{weight.name}: no block fits its rows", "use another layout")
    codes = expanded(writer, weight, byte_levels(weight.levels) + 128, "table.uint8")
    scales = row_scales(writer, weight, block, byte_denominator(tuple(weight.levels.tolist())))
    return matmul_n_bits(writer, x, codes, scales, weight, 8, block)


@lru_cache
def byte_denominator(levels: tuple[float, ...]) -> int:
    """Return the d up to 127 whose multiples of 1 / d are nearest to the levels; 123 for NF4, 74 for NF2."""
    exact = np.array(levels, dtype=np.float64)
    return min(range(1, 128), key=lambda d: float(np.abs(np.round(exact * d) / d - exact).max()))


def byte_levels(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the integers k for which `k / byte_denominator` is nearest to each level."""
    return np.round(levels.astype(np.float64) * byte_denominator(tuple(levels.tolist()))).astype(np.int64)


def rounded_levels(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the levels that the byte table's grid has nearest to the given ones."""
    return (byte_levels(levels) / byte_denominator(tuple(levels.tolist()))).astype(np.float32)
