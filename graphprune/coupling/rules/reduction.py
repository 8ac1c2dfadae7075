"""Operators that consume an axis, and whether they mind a missing unit."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.mean.dim", "aten.sum.dim_IntList")
def reduce(operator: Operator, algebra: Algebra) -> Axes:
    """Sum an axis, or take its mean: surgery keeps the mean's divisor, so a missing unit counts as zero."""
    source = operator["self"]
    rank = len(source.shape)
    dims = {dim % rank for dim in operator["dim"] or range(rank)}
    axes = algebra[source]
    algebra.mark([axes[dim] for dim in sorted(dims)], "normalised")
    if operator["keepdim"]:
        return [algebra.fresh([1])[0] if dim in dims else axis for dim, axis in enumerate(axes)]
    return [axis for dim, axis in enumerate(axes) if dim not in dims]


@rule("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int")
def softmax(operator: Operator, algebra: Algebra) -> Axes:
    """Normalise along an axis: a missing unit would change all the others."""
    source = operator["self"]
    axes = algebra[source]
    dim = operator["dim"] % len(axes)
    algebra.block(axes[dim], "softmax over this axis: its other units would change")
    return list(axes)


@rule("aten.layer_norm.default")
def layer_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Centre and scale along the last axes: no rescaling makes up for a missing unit."""
    axes = algebra[operator["input"]]
    width = len(operator["normalized_shape"])
    for axis in axes[-width:]:
        algebra.mark([axis], "normalised")
        algebra.block(axis, "LayerNorm takes its mean over this axis: its other units would change")
    _couple(operator, algebra, axes[-width:], "weight", "bias")
    return list(axes)


@rule("aten.rms_norm.default")
def rms_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Scale along the last axes; surgery keeps the divisor."""
    axes = algebra[operator["input"]]
    width = len(operator["normalized_shape"])
    algebra.mark(axes[-width:], "normalised")
    for axis in axes[-width:]:
        algebra.block(axis, "the fused RMSNorm divides by the number of units")
    _couple(operator, algebra, axes[-width:], "weight")
    return list(axes)


@rule("aten.batch_norm.default")
def batch_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Scale each channel for itself."""
    axes = algebra[operator["input"]]
    _couple(operator, algebra, axes[1:2], "weight", "bias", "running_mean", "running_var")
    return list(axes)


def _couple(operator: Operator, algebra: Algebra, axes: Axes, *names: str) -> None:
    """Couple the axes that a norm runs over with those of its own parameters, as far as it has them."""
    for name in names:
        if operator[name] is not None:
            for axis, own in zip(axes, algebra[operator[name]], strict=True):
                algebra.same(axis, own)
