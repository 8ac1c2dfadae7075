"""ONNX Runtime's block-wise product of integer codes, and what an affine block adds to it."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import MICROSOFT, GraphWriter
from graphprune.export.packed_matrix import PackedMatrix


def matmul_n_bits(
    writer: GraphWriter,
    x: ir.Value,
    codes: ir.Value,
    scales: ir.Value,
    weight: PackedMatrix,
    bits: int,
    block: int,
) -> ir.Value:
    """Add `x @ (scale * (code - 2^(bits - 1))).T`.

    Args:
        writer: Where the nodes go.
        x: (..., in_features).
        codes: uint8 of out_features * in_features codes, a byte's first in its lowest bits, in flat order.
        scales: float32 (out_features, in_features / block).
        weight: Its shape is used.
        bits: 2, 4 or 8.
        block: 16 or more, a divisor of in_features.
    """
    shape = writer.integers(weight.out_features, weight.in_features // block, block * bits // 8)
    # Level 4 rounds activations to int8; without it the 2- and 8-bit kernels are 20 to 70 times slower.
    return writer.node(
        "MatMulNBits",
        [x, writer.node("Reshape", [codes, shape]), scales],
        domain=MICROSOFT,
        K=weight.in_features,
        N=weight.out_features,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )


def add_block_offsets(
    writer: GraphWriter, y: ir.Value, x: ir.Value, offsets: ir.Value, weight: PackedMatrix, block: int
) -> ir.Value:
    """Add to y what a constant in each block of the weight contributes: the block sums of x times these constants.

    The kernels for zero points that are no integers are a hundred times slower.

    Args:
        writer: Where the nodes go.
        y: (..., out_features).
        x: (..., in_features), of known rank.
        offsets: float32 (out_features, in_features / block).
        weight: Its shape is used.
        block: A divisor of in_features.
    """
    if x.shape is None:
        raise ExportError(f"{weight.name}: the rank of its input is not known", "report this as a bug")
    kept = [0] * (len(x.shape) - 1)
    blocks = writer.node("Reshape", [x, writer.integers(*kept, weight.in_features // block, block)])
    # Counted from the front: of no rows at all, ONNX Runtime sums over no axis that is counted from the end.
    sums = writer.node("ReduceSum", [blocks, writer.integers(len(x.shape))], keepdims=0)
    return writer.node("Add", [y, writer.node("MatMul", [sums, _transposed(writer, offsets)])])


def _transposed(writer: GraphWriter, matrix: ir.Value) -> ir.Value:
    return writer.node("Transpose", [matrix], perm=[1, 0])
