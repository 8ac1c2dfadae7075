"""Fused norms: what they run over, and whether they mind a missing unit."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.layer_norm", vanishes="affine")
def layer_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Centre and scale along the last axes: no rescaling makes up for a missing unit."""
    axes = algebra[operator["input"]]
    width = len(operator["normalized_shape"])
    for axis in axes[-width:]:
        algebra.mark([axis], "normalised")
        algebra.block(axis, "LayerNorm takes its mean over this axis: its other units would change")
    couple_parameters(operator, algebra, axes[-width:], "weight", "bias")
    return list(axes)


@rule("aten.rms_norm", vanishes="first")
def rms_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Scale along the last axes; surgery rescales the result and eps, so that a missing unit counts as zero."""
    source = operator["input"]
    axes = algebra[source]
    width = len(operator["normalized_shape"])
    algebra.mark(axes[-width:], "normalised")
    for dim in range(-width, 0):
        algebra.sum_over([(source, dim)])
    couple_parameters(operator, algebra, axes[-width:], "weight")
    return list(axes)


@rule("aten.batch_norm", vanishes="affine")
def batch_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Scale each channel for itself."""
    axes = algebra[operator["input"]]
    couple_parameters(operator, algebra, axes[1:2], "weight", "bias", "running_mean", "running_var")
    return list(axes)


@rule("aten.instance_norm", vanishes="affine")
def instance_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Centre and scale each channel for itself, over its positions: they may not go."""
    axes = batch_norm(operator, algebra)
    algebra.mark(axes[1:2], "normalised")
    for axis in axes[2:] if operator["use_input_stats"] else []:
        algebra.block(axis, "InstanceNorm takes its mean over this axis: its other units would change")
    return axes


@rule("aten.group_norm", vanishes="affine")
def group_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Centre and scale within groups of channels: whole groups may go, a channel of each may not."""
    source, count = operator["input"], operator["num_groups"]
    axes = algebra[source]
    group, member = algebra.reshape([axes[1]], [source.shape[1]], [count, source.shape[1] // count])
    if member.size > 1:
        algebra.block(member, "GroupNorm takes its mean over this axis: its other units would change")
    if group.size > 1:
        algebra.mark([group], "normalised")
    couple_parameters(operator, algebra, axes[1:2], "weight", "bias")
    return list(axes)


@rule("aten._weight_norm", vanishes="first")
def weight_norm(operator: Operator, algebra: Algebra) -> Axes:
    """Return g · v / ‖v‖, the norm over all axes of v but one: a missing unit adds nothing to it."""
    direction, length = operator.inputs[:2]
    axes, dim = algebra[direction], operator["dim"] % len(direction.shape)
    algebra.same(axes[dim], algebra[length][dim])
    for other in range(len(axes)):
        if other != dim:
            algebra.sum_over([(direction, other)])
    return list(axes)


def couple_parameters(operator: Operator, algebra: Algebra, axes: Axes, *names: str) -> None:
    """Couple the axes that a norm runs over with those of its own parameters, as far as it has them."""
    for name in names:
        if operator[name] is not None:
            for axis, own in zip(axes, algebra[operator[name]], strict=True):
                algebra.same(axis, own)
