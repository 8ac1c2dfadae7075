"""Operators in which the units of an axis have an order: shifts, sums so far, padding, resampling."""

from __future__ import annotations

import math

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.flip", "aten.roll", vanishes="first")
def shift(operator: Operator, algebra: Algebra) -> Axes:
    """Reverse or rotate some axes."""
    return _ordered(operator, algebra, operator["dims"] or range(len(operator["self"].shape)))


@rule("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.cummax", "aten.diff", "aten.softmin")
def accumulate(operator: Operator, algebra: Algebra) -> Axes | tuple[Axes, ...]:
    """Sum an axis so far; sums of how often units occur are the places where their rows end."""
    source = operator["self"]
    if operator.target.startswith("aten.cumsum"):
        counted = algebra.understand(source, "counts")
        if counted is not None:
            algebra.name(operator.outputs[0], "boundaries", counted)
            return list(algebra[source])
    axes = _ordered(operator, algebra, [operator["dim"]])
    return tuple(list(axes) for _ in operator.outputs) if len(operator.outputs) > 1 else axes


@rule("aten.pad", "aten.constant_pad_nd", vanishes="first")
def pad(operator: Operator, algebra: Algebra) -> Axes:
    """Lengthen axes at their ends, the last axis first."""
    source, amounts = operator["self"], operator["pad"]
    axes = list(algebra[source])
    for distance, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        if (before, after) == (0, 0):
            continue
        axis = axes[-distance]
        if before < 0 or after < 0 or operator["mode"] not in (None, "constant"):
            algebra.pin(axis, f"{operator.target} reads it at its ends")
            axes[-distance] = algebra.ordered(source.shape[-distance] + before + after, operator.target)
        else:
            ends = [algebra.ordered(size, operator.target) for size in (before, after)]
            axes[-distance] = algebra.concat([ends[0], axis, ends[1]])
    return axes


@rule("aten.im2col", vanishes="first")
def windows(operator: Operator, algebra: Algebra) -> Axes:
    """Lay the windows over an image side by side: channels become channels × positions in a window."""
    (output,) = operator.outputs
    *batch, channels, tall, wide = algebra[operator["self"]]
    for axis in (tall, wide):
        algebra.pin(axis, f"positions that {operator.target} slides over")
    inside = algebra.ordered(math.prod(operator["kernel_size"]), operator.target)
    count = output.shape[-1] if output else 0
    return [*batch, algebra.solver.product([channels, inside]), algebra.ordered(count, operator.target)]


@rule("aten.unfold", vanishes="first")
def windows_along_one_axis(operator: Operator, algebra: Algebra) -> Axes:
    """Cut windows out of one axis, whose own positions become the last axis."""
    axes = list(algebra[operator["self"]])
    dim = operator["dimension"] % len(axes)
    return [
        *_ordered(operator, algebra, [dim]),
        algebra.ordered(operator["size"], operator.target),
    ]


def _window_dims(target: str) -> int:
    return next(count for count in (3, 2, 1) if f"{count}d" in target)


@rule(
    *(
        f"aten.{name}{count}d"
        for count in (1, 2, 3)
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    ),
    *(f"aten.upsample_{name}" for name in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "trilinear3d")),
    *(f"aten.upsample_{name}" for name in ("bilinear2d", "bicubic2d")),
    *(f"aten._upsample_{name}_aa" for name in ("bilinear2d", "bicubic2d")),
    *(f"aten._adaptive_avg_pool{count}d" for count in (2, 3)),
    vanishes="first",
)
def resample(operator: Operator, algebra: Algebra) -> Axes:
    """Slide a window over the last axes, or resample them; the channels in front stay as they are."""
    source, output = operator.inputs[0], operator.outputs[0]
    count = _window_dims(operator.target)
    for axis in algebra[source][-count:]:
        algebra.pin(axis, f"positions that {operator.target} slides over")
    sizes = output.shape[-count:] if output else ()
    return [*algebra[source][:-count], *(algebra.ordered(size, operator.target) for size in sizes)]


def _ordered(operator: Operator, algebra: Algebra, dims: object) -> Axes:
    axes = list(algebra[operator.inputs[0]])
    for dim in dims:  # type: ignore[attr-defined]
        algebra.pin(axes[dim], f"{operator.target} reads its units in order")
        axes[dim] = algebra.ordered(operator.outputs[0].shape[dim], operator.target)  # type: ignore[union-attr]
    return axes
