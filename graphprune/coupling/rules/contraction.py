"""Linear maps: the contracted axes are equal and gone from the result."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.linear.default")
def linear(operator: Operator, algebra: Algebra) -> Axes:
    """Return x Wᵀ + b, with W as (out, in)."""
    source, weight, bias = operator["input"], operator["weight"], operator["bias"]
    algebra.contract(source, -1, weight, 1)
    produced = algebra.produce(weight, 0)
    if bias is not None:
        algebra.same(algebra[bias][0], produced)
    return [*algebra[source][:-1], produced]


@rule("aten.addmm.default")
def addmm(operator: Operator, algebra: Algebra) -> Axes:
    """Return b + x W, with W as (in, out)."""
    bias, source, weight = operator["self"], operator["mat1"], operator["mat2"]
    algebra.contract(source, 1, weight, 0)
    result = [algebra[source][0], algebra.produce(weight, 1)]
    return algebra.align(
        [(algebra[bias], bias.shape), (result, (source.shape[0], weight.shape[1]))],
        (source.shape[0], weight.shape[1]),
    )


@rule("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def matmul(operator: Operator, algebra: Algebra) -> Axes:
    """Return x y; further axes in front are batches of matrices."""
    first, second = operator.inputs[:2]
    if min(len(first.shape), len(second.shape)) < 2:
        return _matrix_vector(operator, algebra)
    algebra.contract(first, -1, second, -2)
    (output,) = operator.outputs
    shape = output.shape[:-2] if output else ()
    batch = algebra.align(
        [(algebra[first][:-2], first.shape[:-2]), (algebra[second][:-2], second.shape[:-2])], shape
    )
    if not (first.is_weight or second.is_weight):
        algebra.mark(batch, "heads")
        algebra.mark([algebra[first][-1], algebra[second][-1]], "head_dim")
    return [*batch, algebra.produce(first, -2), algebra.produce(second, -1)]


def _matrix_vector(operator: Operator, algebra: Algebra) -> Axes:
    first, second = operator.inputs[:2]
    vector_first = len(first.shape) == 1
    algebra.contract(first, -1, second, 0 if len(second.shape) == 1 else -2)
    rest = [] if vector_first else list(algebra[first][:-1])
    if len(second.shape) > 1:
        rest = [*algebra[second][:-2], algebra[second][-1]]
    return rest


@rule("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
def convolution(operator: Operator, algebra: Algebra) -> Axes:
    """Return the convolution of x (batch, in, …) with W (out, in / groups, …)."""
    source, weight, bias = operator["input"], operator["weight"], operator["bias"]
    groups = operator["groups"]
    axes = algebra[weight]
    produced = algebra.produce(weight, 0)
    if groups == 1:
        algebra.contract(source, 1, weight, 1)
    elif groups == weight.shape[0] == source.shape[1]:
        algebra.same(algebra[source][1], produced)  # depth-wise: each channel for itself
    else:
        for axis in (algebra[source][1], produced, axes[1]):
            algebra.pin(axis, f"{operator.target} with {groups} groups has no rule")
    for axis in axes[2:]:
        algebra.pin(axis, "a convolution's window")
    if bias is not None:
        algebra.same(algebra[bias][0], produced)
    (output,) = operator.outputs
    spatial = algebra.fresh(output.shape[2:] if output else ())
    for axis in (*spatial, *algebra[source][2:]):
        algebra.pin(axis, "positions that a convolution slides over")
    return [algebra[source][0], produced, *spatial]
