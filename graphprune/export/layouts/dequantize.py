"""Packed weights by standard operators alone, as ONNX Runtime and others turn into block-wise products."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.layouts.byte_table import byte_denominator, byte_levels, holds_levels
from graphprune.export.layouts.codes import expanded
from graphprune.export.layouts.matmul_n_bits import add_block_offsets
from graphprune.export.layouts.registry import layout
from graphprune.export.layouts.scales import row_offsets, row_scales
from graphprune.export.packed_matrix import PackedMatrix


def _exact(weight: PackedMatrix) -> bool:
    return weight.even or holds_levels(weight)


@layout(
    "dequantize",
    exact=_exact,
    fits=lambda weight: (
        weight.block() is not None and (weight.even or (weight.offsets is None and weight.bits < 8))
    ),
)
def write_dequantize(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """DequantizeLinear in blocks along the summed axis, then MatMul.

    A session looks the packed bytes up in a table of 8-bit integers when it loads the file. Evenly spaced levels are
    held exactly, codebooks rounded as `byte_table` has them.
    """
    block = weight.block()
    if block is None:
        raise ExportError(f"{weight.name}: no block fits its rows", "use another layout")
    integers, divisor, share = _integers(weight)
    values = expanded(writer, weight, integers, "table.int8")
    shape = writer.integers(weight.out_features, weight.in_features)
    codes = writer.node("Cast", [writer.node("Reshape", [values, shape])], to=ir.DataType.INT8.value)
    scales = row_scales(writer, weight, block, divisor)
    columns = writer.node(
        "DequantizeLinear",
        [_transposed(writer, codes), _transposed(writer, scales)],
        axis=0,
        block_size=block,
    )
    y = writer.node("MatMul", [x, columns])
    if weight.offsets is None and not share:
        return y
    return add_block_offsets(writer, y, x, row_offsets(writer, weight, block, share), weight, block)


def _integers(weight: PackedMatrix) -> tuple[npt.NDArray[np.int64], float, float]:
    """Return integers k, a divisor d and a share s of absmax: a level is ``k / d + s``."""
    if not weight.even:
        return byte_levels(weight.levels), byte_denominator(tuple(weight.levels.tolist())), 0.0
    levels = len(weight.levels)
    return np.arange(levels) - levels // 2, (levels - 1) / 2, 0.0 if levels % 2 else 1 / (levels - 1)


def _transposed(writer: GraphWriter, matrix: ir.Value) -> ir.Value:
    return writer.node("Transpose", [matrix], perm=[1, 0])
