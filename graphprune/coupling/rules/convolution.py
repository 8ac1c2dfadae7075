"""Convolutions, plain, grouped, depth-wise and transposed."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule(*(f"aten.conv{count}d" for count in (1, 2, 3)), vanishes="any")
def convolution(operator: Operator, algebra: Algebra) -> Axes:
    """Return the convolution of x (batch, in, …) with W (out, in / groups, …)."""
    return _convolution(operator, algebra, produced=0, contracted=1)


@rule(*(f"aten.conv_transpose{count}d" for count in (1, 2, 3)), vanishes="any")
def transposed_convolution(operator: Operator, algebra: Algebra) -> Axes:
    """Return the transposed convolution of x (batch, in, …) with W (in, out / groups, …)."""
    return _convolution(operator, algebra, produced=1, contracted=0)


def _convolution(operator: Operator, algebra: Algebra, produced: int, contracted: int) -> Axes:
    """Couple channels; with groups both channel axes are groups × channels of one group."""
    source, weight, bias = operator["input"], operator["weight"], operator["bias"]
    count, (output,) = operator["groups"], operator.outputs
    rank = len(weight.shape) - 2
    batch = list(algebra[source][: len(source.shape) - rank - 1])
    channels = algebra[source][-rank - 1]
    algebra.mark([channels, algebra[weight][produced]], "window")
    if count == 1:
        algebra.contract(source, -rank - 1, weight, contracted)
        result = algebra.produce(weight, produced)
    else:
        result = _grouped(operator, algebra, channels, produced, contracted)
    for axis in algebra[weight][2:]:
        algebra.pin(axis, "a convolution's window")
    if bias is not None:
        algebra.same(algebra[bias][0], result)
    for axis in algebra[source][-rank:]:
        algebra.pin(axis, "positions that a convolution slides over")
    sizes = output.shape[-rank:] if output else ()
    return [*batch, result, *(algebra.ordered(size, operator.target) for size in sizes)]


def _grouped(
    operator: Operator, algebra: Algebra, channels: Layout, produced: int, contracted: int
) -> Layout:
    """Couple groups × channels of one group: axis 0 of the weight holds all of its side."""
    source, weight, count = operator["input"], operator["weight"], operator["groups"]
    groups, own = algebra.fresh([count, weight.shape[0] // count])
    whole, other = algebra[weight][0], algebra.solver.product([groups, algebra[weight][1]])
    algebra.same(whole, algebra.solver.product([groups, own]))
    mine, result = (other, whole) if produced == 0 else (whole, other)
    algebra.same(channels, mine)
    algebra.sum_over([(source, 1 - len(weight.shape)), (weight, contracted)])
    if weight.shape[contracted] > 1 or contracted == 0:
        algebra.take_side(weight, contracted, "consumes")
        algebra.take_side(weight, produced, "produces")
    return result
