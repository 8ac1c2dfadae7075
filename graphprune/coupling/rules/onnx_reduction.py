"""Operators of ONNX that consume or normalise an axis."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.normalisation import batch_norm, group_norm, instance_norm, layer_norm
from graphprune.coupling.rules.onnx_reshaping import asking, numbers
from graphprune.coupling.rules.reduction import reduce, softmax
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator, Value


@rule(*(f"onnx.Reduce{name}" for name in ("Sum", "Mean", "SumSquare", "L1", "L2")), vanishes="first")
def sums(operator: Operator, algebra: Algebra) -> Axes:
    """Sum an axis: a unit of zeros adds nothing."""
    source, dims = operator["data"], _dims(operator)
    if not dims:
        return list(algebra[source])
    return reduce(asking(operator, self=source, dim=dims, keepdim=operator["keepdims"]), algebra)


@rule(*(f"onnx.Reduce{name}" for name in ("Max", "Min", "Prod", "LogSum", "LogSumExp")))
def extremes(operator: Operator, algebra: Algebra) -> Axes:
    """Reduce an axis on which a unit of zeros is not as good as none."""
    axes = algebra[operator["data"]]
    for dim in _dims(operator):
        algebra.block(axes[dim], f"{operator.target} over this axis minds a missing unit")
    return sums(operator, algebra)


@rule("onnx.Softmax", "onnx.LogSoftmax")
def normalised(operator: Operator, algebra: Algebra) -> Axes:
    """Normalise along an axis."""
    return softmax(asking(operator, self=operator["input"], dim=operator["axis"]), algebra)


@rule("onnx.LayerNormalization", vanishes="affine")
def layer_normalization(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Centre and scale along the last axes."""
    return _centred(operator, algebra, operator["X"], operator["Scale"], operator["B"])


@rule(
    "onnx.RMSNormalization",
    "onnx.SimplifiedLayerNormalization",
    "com.microsoft.SimplifiedLayerNormalization",
    vanishes="first",
)
def rms_normalization(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Scale along the last axes."""
    return _scaled(operator, algebra, operator["X"], operator["scale"])


@rule("com.microsoft.SkipLayerNormalization")
def skip_layer_normalization(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Add, then centre and scale."""
    source = _added(operator, algebra)
    return _centred(operator, algebra, source, operator["gamma"], operator["beta"])


@rule("com.microsoft.SkipSimplifiedLayerNormalization", vanishes="all")
def skip_rms_normalization(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Add, then scale."""
    return _scaled(operator, algebra, _added(operator, algebra), operator["gamma"])


@rule("onnx.BatchNormalization", vanishes="affine")
def batch_normalization(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Scale each channel for itself."""
    mean, variance = operator["input_mean"], operator["input_var"]
    call = asking(
        operator,
        input=operator["X"],
        weight=operator["scale"],
        bias=operator["B"],
        running_mean=mean,
        running_var=variance,
    )
    return (batch_norm(call, algebra), *(list(algebra[mean]) for _ in operator.outputs[1:]))


@rule("onnx.InstanceNormalization", vanishes="affine")
def instance_normalization(operator: Operator, algebra: Algebra) -> Axes:
    """Centre and scale each channel for itself, over its positions."""
    source, scale, bias = operator["input"], operator["scale"], operator["B"]
    call = asking(operator, input=source, weight=scale, bias=bias, use_input_stats=True)
    return instance_norm(call, algebra)


@rule("onnx.GroupNormalization", vanishes="affine")
def group_normalization(operator: Operator, algebra: Algebra) -> Axes:
    """Centre and scale within groups of channels; before opset 21 each group has one weight, not each channel."""
    source, count, scale, bias = (operator[name] for name in ("X", "num_groups", "scale", "bias"))
    channels = source.shape[1]
    if scale.shape[0] == channels:
        call = asking(operator, input=source, num_groups=count, weight=scale, bias=bias)
        return group_norm(call, algebra)
    axes = group_norm(asking(operator, input=source, num_groups=count), algebra)
    groups = algebra.reshape(axes[1:2], [channels], [count, channels // count])[0]
    algebra.same(groups, algebra[scale][0])
    algebra.same(groups, algebra[bias][0])
    return axes


def _dims(operator: Operator) -> tuple[int, ...]:
    """Return the axes that a reduction names, in an operand or (before opset 18) in an attribute."""
    rank = len(operator["data"].shape)
    given = operator["axes"]
    dims = given if isinstance(given, tuple) else numbers(given)
    if not dims:
        return () if operator["noop_with_empty_axes"] else tuple(range(rank))
    return tuple(dim % rank for dim in dims)


def _centred(
    operator: Operator, algebra: Algebra, source: Value, weight: Value, bias: Value | None
) -> tuple[Axes, ...]:
    call = asking(operator, input=source, weight=weight, bias=bias, normalized_shape=_over(operator, source))
    return _results(operator, algebra, layer_norm(call, algebra))


def _scaled(operator: Operator, algebra: Algebra, source: Value, weight: Value) -> tuple[Axes, ...]:
    """Couple the weight with the axes that it scales.

    Nothing is blocked: fewer units are exact once the weight is multiplied by √(n/n') and epsilon by n/n'.
    """
    width = len(_over(operator, source))
    axes = algebra[source][-width:]
    for dim in range(-width, 0):
        algebra.sum_over([(source, dim)])
    algebra.mark(axes, "normalised")
    algebra.align([(axes, [axis.size for axis in axes]), (algebra[weight], weight.shape)], weight.shape)
    return _results(operator, algebra, list(algebra[source]))


def _over(operator: Operator, source: Value) -> tuple[int, ...]:
    """Return the sizes of the axes that a norm runs over."""
    first = operator["axis"]
    return source.shape[-1 if first is None else first :]


def _added(operator: Operator, algebra: Algebra) -> Value:
    """Couple what is added before a norm, and return the operand that has the result's shape."""
    source: Value = operator["input"]
    terms = [operator[name] for name in ("input", "skip", "bias") if operator[name] is not None]
    algebra.broadcast(terms, source.shape)
    return source


def _results(operator: Operator, algebra: Algebra, axes: Axes) -> tuple[Axes, ...]:
    """Return the norm's result, and as far as they are asked for the statistics and the sum before it."""
    return tuple(
        [
            axis if value is None or axis.size == value.shape[position] else algebra.fresh([1])[0]
            for position, axis in enumerate(axes)
        ]
        for value in operator.outputs
    )
