"""Operators of ONNX that move data without computing, and such that make values from sizes."""

from __future__ import annotations

from dataclasses import replace

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.arrangement import accumulate, pad
from graphprune.coupling.rules.factory import constant, numbered
from graphprune.coupling.rules.registry import rule
from graphprune.coupling.rules.reshaping import cat, expand, permute, repeat, reverse, slice_, split, view
from graphprune.errors import CouplingError
from graphprune.trace.graph import Argument, Operator, Value

rule("onnx.Shape", "onnx.Size", "onnx.ConstantOfShape", "onnx.EyeLike")(constant)
rule("onnx.Range")(numbered)
rule("onnx.Reshape", "onnx.Flatten", "onnx.Unsqueeze", "onnx.Squeeze", vanishes="first", moves=True)(view)


def asking(operator: Operator, **arguments: Argument) -> Operator:
    """Return the same call with the arguments that another operator's rule asks for, and its first result only."""
    return replace(operator, arguments=arguments, outputs=operator.outputs[:1])


def numbers(value: Value | None) -> tuple[int, ...] | None:
    """Return the numbers of an operand that says how to compute, such as a shape; None if it is not there.

    Raises:
        CouplingError: If they are not known from the graph.
    """
    if value is None:
        return None
    if value.content is None:
        raise CouplingError(f"the numbers of '{value.name}' are not known", "give it as a constant")
    return tuple(int(number) for number in value.content.reshape(-1))


@rule("onnx.Transpose", vanishes="first", moves=True)
def transpose(operator: Operator, algebra: Algebra) -> Axes:
    """Reorder the axes; without an order, reverse them."""
    call = asking(operator, self=operator["data"], dims=operator["perm"])
    return permute(call, algebra) if operator["perm"] else reverse(call, algebra)


@rule("onnx.Expand", vanishes="first", moves=True)
def broadcast(operator: Operator, algebra: Algebra) -> Axes:
    """Repeat axes of size 1."""
    return expand(asking(operator, self=operator["input"]), algebra)


@rule("onnx.Tile", vanishes="first", moves=True)
def tile(operator: Operator, algebra: Algebra) -> Axes:
    """Lay copies end to end."""
    return repeat(asking(operator, self=operator["input"]), algebra)


@rule("onnx.Slice", vanishes="first", moves=True)
def slices(operator: Operator, algebra: Algebra) -> Axes:
    """Keep a consecutive segment, or every n-th index, of each axis that is named."""
    source, axes = operator["data"], list(algebra[operator["data"]])
    if operator["starts"].content is None or operator["ends"].content is None:
        return _cut_somewhere(operator, algebra, axes)
    starts, ends = numbers(operator["starts"]) or (), numbers(operator["ends"]) or ()
    dims = numbers(operator["axes"]) or tuple(range(len(starts)))
    steps = numbers(operator["steps"]) or (1,) * len(starts)
    for dim, start, end, step in zip(dims, starts, ends, steps, strict=True):
        call = asking(operator, self=source, dim=dim % len(axes), start=start, end=end, step=step)
        axes[dim] = slice_(call, algebra)[dim]
    return axes


def _cut_somewhere(operator: Operator, algebra: Algebra, axes: Axes) -> Axes:
    """Pin the axes that are cut where the inputs' sizes say."""
    (output,) = operator.outputs
    named = numbers(operator["axes"]) or tuple(range(len(operator["starts"].shape)))
    for dim in named:
        size = output.shape[dim] if output else axes[dim].size
        if size != axes[dim].size:
            algebra.pin(axes[dim], f"{operator.target} cuts it where the inputs' sizes say")
            axes[dim] = algebra.ordered(size, operator.target)
    return axes


@rule("onnx.Split", vanishes="first", moves=True)
def segments(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Cut an axis into consecutive segments."""
    return split(replace(operator, arguments={"self": operator["input"], "dim": operator["axis"]}), algebra)


@rule("onnx.Concat", vanishes="each")
def concat(operator: Operator, algebra: Algebra) -> Axes:
    """Lay operands end to end along one axis."""
    return cat(asking(operator, tensors=operator["inputs"], dim=operator["axis"]), algebra)


@rule("onnx.Pad", vanishes="first")
def lengthen(operator: Operator, algebra: Algebra) -> Axes:
    """Lengthen axes at their ends."""
    source = operator["data"]
    rank, amounts = len(source.shape), numbers(operator["pads"]) or ()
    dims = [dim % rank for dim in numbers(operator["axes"]) or range(rank)]
    ends = dict(zip(dims, zip(amounts[: len(dims)], amounts[len(dims) :], strict=True), strict=True))
    last_first = tuple(amount for dim in reversed(range(rank)) for amount in ends.get(dim, (0, 0)))
    return pad(asking(operator, self=source, pad=last_first, mode=operator["mode"]), algebra)


@rule("onnx.CumSum")
def cumulative_sum(operator: Operator, algebra: Algebra) -> Axes | tuple[Axes, ...]:
    """Sum an axis so far."""
    (dim,) = numbers(operator["axis"]) or (0,)
    return accumulate(asking(operator, self=operator["x"], dim=dim), algebra)


@rule("onnx.Resize", "onnx.Upsample", vanishes="first")
def resample(operator: Operator, algebra: Algebra) -> Axes:
    """Resample some axes; those that keep their size are carried over."""
    source, (output,) = operator.inputs[0], operator.outputs
    result: Axes = []
    for axis, size in zip(algebra[source], output.shape if output else (), strict=True):
        if axis.size != size:
            algebra.pin(axis, f"{operator.target} resamples it")
        result.append(axis if axis.size == size else algebra.ordered(size, operator.target))
    return result
