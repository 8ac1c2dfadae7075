"""Operators on quantized weights: units along a quantized axis go by whole blocks, which share a scale."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.registry import rule
from graphprune.errors import CouplingError
from graphprune.trace.graph import Operator, Value


@rule("com.microsoft.MatMulNBits", vanishes="any")
def matmul_n_bits(operator: Operator, algebra: Algebra) -> Axes:
    """Return x Wᵀ + b; W is (out, blocks, bytes of a block), its scales (out × blocks)."""
    codes = operator["B"]
    rows = algebra.produce(codes, 0)
    blocks, packed = algebra[codes][1:]
    algebra.take_side(codes, 1, "consumes")
    algebra.pin(packed, "packed codes")
    _sum_by_blocks(operator, algebra, blocks)
    _couple(algebra, operator["scales"], [rows, blocks])
    if operator["zero_points"] is not None:
        _couple_zero_points(operator, algebra, operator["zero_points"], rows, blocks)
    if operator["g_idx"] is not None:
        algebra.pin(blocks, "g_idx reads blocks by number")
    if operator["bias"] is not None:
        algebra.same(algebra[operator["bias"]][0], rows)
    return [*algebra[operator["A"]][:-1], rows]


@rule("com.microsoft.MatMulBnb4", vanishes="any")
def matmul_bnb4(operator: Operator, algebra: Algebra) -> Axes:
    """Return x Wᵀ; W is one row of bytes, (out × blocks × bytes of a block), absmax (out × blocks)."""
    codes, inner, block = operator["B"], operator["K"], operator["block_size"]
    if inner % block:
        raise CouplingError(f"a block of {block} crosses the rows of {inner}", "quantize row by row")
    rows, blocks, packed = algebra.fresh([operator["N"], inner // block, block // 2])
    algebra.pin(packed, "packed codes")
    algebra.same(algebra.produce(codes, 0), algebra.solver.product([rows, blocks, packed]))
    _couple(algebra, operator["absmax"], [rows, blocks])
    _sum_by_blocks(operator, algebra, blocks)
    return [*algebra[operator["A"]][:-1], rows]


@rule("com.microsoft.GatherBlockQuantized", vanishes="any")
def gather_block_quantized(operator: Operator, algebra: Algebra) -> Axes:
    """Read rows of a quantized table by index."""
    table, scales, indices = operator["data"], operator["scales"], operator["indices"]
    if len(table.shape) != 2 or operator["gather_axis"] or operator["quantize_axis"] not in (None, 1, -1):
        raise CouplingError("GatherBlockQuantized reads another axis than the first of two", "gather rows")
    rows, blocks = algebra[scales]
    algebra.mark([rows], "lookup")
    algebra.pin(rows, "a lookup reads its rows by number")
    algebra.same(algebra[table][0], rows)
    packed = algebra.fresh([table.shape[1] // blocks.size])[0]
    algebra.pin(packed, "packed codes")
    algebra.same(algebra.produce(table, 1), algebra.solver.product([blocks, packed]))
    if operator["zero_points"] is not None:
        _couple_zero_points(operator, algebra, operator["zero_points"], rows, blocks)
    (output,) = operator.outputs
    width = output.shape[-1] if output else 0
    return [*algebra[indices], algebra.solver.product([blocks, _within(algebra, width, blocks)])]


@rule("onnx.DequantizeLinear", "onnx.QuantizeLinear", vanishes="any")
def scale(operator: Operator, algebra: Algebra) -> Axes:
    """Scale the whole, each index of an axis, or each block of one."""
    source: Value = operator["x"]
    axis = (1 if operator["axis"] is None else operator["axis"]) % max(1, len(source.shape))
    axes = list(algebra[source])
    for value in (
        operator["x_scale"] or operator["y_scale"],
        operator["x_zero_point"] or operator["y_zero_point"],
    ):
        if value is None or value.shape in ((), (1,)):
            continue
        if len(value.shape) == 1:
            algebra.same(axes[axis], algebra[value][0])
            continue
        for position, other in enumerate(algebra[value]):
            if position != axis:
                algebra.same(axes[position], other)
            else:
                inner = _within(algebra, axes[axis].size, other)
                algebra.same(algebra.solver.product([other, inner]), axes[axis])
    return axes


def _sum_by_blocks(operator: Operator, algebra: Algebra, blocks: Layout) -> None:
    """Couple the axis of the activations that is summed with the weight's blocks."""
    source = operator["A"]
    inner = algebra[source][-1]
    algebra.sum_over([(source, -1), (operator["B"], blocks)])
    if inner.size != blocks.size * operator["block_size"]:
        algebra.pin(blocks, "the last quantization block is not full")
        algebra.pin(inner, "the last quantization block is not full")
    else:
        algebra.same(algebra.solver.product([blocks, _within(algebra, inner.size, blocks)]), inner)


def _within(algebra: Algebra, size: int, blocks: Layout) -> Layout:
    """Return the units inside of a block, which stay together."""
    if size % blocks.size:
        raise CouplingError(f"{size} numbers do not fall into {blocks.size} equal blocks", "pad the weight")
    inner = algebra.fresh([size // blocks.size])[0]
    algebra.pin(inner, "a quantization block is kept or removed as a whole")
    return inner


def _couple(algebra: Algebra, value: Value, factors: list[Layout]) -> None:
    """Couple a tensor with rows and blocks, whether it is stored in one axis or in two."""
    algebra.same(algebra.solver.product(algebra[value]), algebra.solver.product(factors))


def _couple_zero_points(
    operator: Operator, algebra: Algebra, value: Value, rows: Layout, blocks: Layout
) -> None:
    """Couple zero points, several of which may share a byte."""
    together = 1 if value.dtype.startswith("float") else 8 // (operator["bits"] or 4)
    if (
        together == 1
        or value.shape[-1] * (value.shape[0] if len(value.shape) > 1 else 1) == rows.size * blocks.size
    ):
        _couple(algebra, value, [rows, blocks])
    elif blocks.size % together:
        algebra.pin(blocks, "zero points of several blocks share a byte")
        for axis in algebra[value]:
            algebra.pin(axis, "zero points of several blocks share a byte")
        algebra.pin(rows, "zero points of several blocks share a byte")
    else:
        bytes_, shared = algebra.fresh([blocks.size // together, together])
        algebra.pin(shared, "zero points of several blocks share a byte")
        algebra.same(algebra.solver.product([bytes_, shared]), blocks)
        _couple(algebra, value, [rows, bytes_])
