"""Operators that consume an axis, and whether they mind a missing unit."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator, Value


@rule("aten.mean", "aten.sum", "aten.linalg_vector_norm", "aten.linalg_norm", "aten.norm", vanishes="first")
def reduce(operator: Operator, algebra: Algebra) -> Axes:
    """Sum an axis, or take its mean: surgery keeps the mean's divisor, so a missing unit counts as zero."""
    source = operator.inputs[0]
    dims = _dims(operator)
    if (
        operator.target.startswith("aten.linalg_norm")
        and len(dims) > 1
        and operator["ord"] not in (None, "fro")
    ):
        raise ValueError("a matrix norm that is no sum of squares")
    if algebra.is_activation(source):
        algebra.mark([algebra[source][dim] for dim in dims], "normalised")
    for dim in dims:
        algebra.sum_over([(source, dim)])
    return _without(operator, algebra, dims)


@rule("aten.cosine_similarity", vanishes="any")
def cosine_similarity(operator: Operator, algebra: Algebra) -> Axes:
    """Sum the products of two operands along an axis, and the squares of each."""
    pair = (operator["x1"], operator["x2"])
    rank = max(len(value.shape) for value in pair)
    shape = [max(sizes) for sizes in zip(*(_padded(value, rank) for value in pair), strict=True)]
    axes = algebra.broadcast(pair, shape)
    dim = operator["dim"] % rank
    for value in pair:
        algebra.sum_over([(value, axes[dim])])
    return [axis for position, axis in enumerate(axes) if position != dim]


@rule("aten.var", "aten.std", "aten.prod", "aten.amax", "aten.amin", "aten.logsumexp")
@rule("aten.any", "aten.all", "aten.count_nonzero")
def aggregate(operator: Operator, algebra: Algebra) -> Axes:
    """Consume an axis in a way that minds a missing unit."""
    return _minded(operator, algebra)


@rule("aten.var_mean", "aten.max.dim", "aten.min.dim", "aten.median.dim", "aten.mode", "aten.kthvalue")
def aggregate_twice(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Consume an axis and return two results."""
    axes = _minded(operator, algebra)
    return axes, list(axes)


@rule("aten.argmax", "aten.argmin")
def number_of_one(operator: Operator, algebra: Algebra) -> Axes:
    """Return which unit it is: units have numbers."""
    dims = _dims(operator)
    for dim in dims:
        algebra.pin(algebra[operator.inputs[0]][dim], f"{operator.target} returns the numbers of its units")
    return _without(operator, algebra, dims)


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(operator: Operator, algebra: Algebra) -> Axes:
    """Normalise along an axis: a missing unit would change all the others, unless it cannot be chosen either."""
    axes = algebra[operator.inputs[0]]
    algebra.mark([axes[operator["dim"]]], "softmax")
    return list(axes)


def _padded(value: Value, rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(value.shape)) + value.shape


def _dims(operator: Operator) -> list[int]:
    rank = len(operator.inputs[0].shape)
    dim = operator["dim"]
    if dim is None or dim == ():
        return list(range(rank))
    return sorted({int(item) % rank for item in (dim if isinstance(dim, tuple) else (dim,))}) if rank else []


def _minded(operator: Operator, algebra: Algebra) -> Axes:
    dims = _dims(operator)
    for dim in dims:
        axis = algebra[operator.inputs[0]][dim]
        algebra.mark([axis], "normalised")
        algebra.block(axis, f"{operator.target} over this axis: a missing unit is not the same as zero")
    return _without(operator, algebra, dims)


def _without(operator: Operator, algebra: Algebra, dims: list[int]) -> Axes:
    axes = algebra[operator.inputs[0]]
    if operator["keepdim"]:
        return [algebra.fresh([1])[0] if dim in dims else axis for dim, axis in enumerate(axes)]
    return [axis for dim, axis in enumerate(axes) if dim not in dims]
