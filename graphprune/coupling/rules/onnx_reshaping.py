"""Operators of ONNX that move data without computing, and such that make values from sizes."""

from __future__ import annotations

from dataclasses import replace

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.factory import arange, constant
from graphprune.coupling.rules.registry import rule
from graphprune.coupling.rules.reshaping import cat, expand, permute, reverse, slice_, split, view
from graphprune.errors import CouplingError
from graphprune.trace.graph import Argument, Operator, Value

rule("onnx.Shape", "onnx.Size", "onnx.ConstantOfShape", "onnx.EyeLike")(constant)
rule("onnx.Range")(arange)
rule("onnx.Reshape", "onnx.Flatten", "onnx.Unsqueeze", "onnx.Squeeze")(view)


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


@rule("onnx.Transpose")
def transpose(operator: Operator, algebra: Algebra) -> Axes:
    """Reorder the axes; without an order, reverse them."""
    call = asking(operator, self=operator["data"], dims=operator["perm"])
    return permute(call, algebra) if operator["perm"] else reverse(call, algebra)


@rule("onnx.Expand")
def broadcast(operator: Operator, algebra: Algebra) -> Axes:
    """Repeat axes of size 1."""
    return expand(asking(operator, self=operator["input"]), algebra)


@rule("onnx.Tile")
def tile(operator: Operator, algebra: Algebra) -> Axes:
    """Repeat whole axes: a free atom before each."""
    axes = algebra[operator["input"]]
    repeats = algebra.fresh(numbers(operator["repeats"]) or ())
    algebra.mark(repeats, "repeated")
    return [algebra.solver.product([outer, axis]) for outer, axis in zip(repeats, axes, strict=True)]


@rule("onnx.Slice")
def slices(operator: Operator, algebra: Algebra) -> Axes:
    """Keep a consecutive segment of each axis that is named."""
    source = operator["data"]
    starts, ends = numbers(operator["starts"]) or (), numbers(operator["ends"]) or ()
    dims = numbers(operator["axes"]) or tuple(range(len(starts)))
    steps = numbers(operator["steps"]) or (1,) * len(starts)
    axes = list(algebra[source])
    for dim, start, end, step in zip(dims, starts, ends, steps, strict=True):
        call = asking(operator, self=source, dim=dim, start=start, end=end, step=step)
        axes[dim] = slice_(call, algebra)[dim]
    return axes


@rule("onnx.Split")
def segments(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Cut an axis into consecutive segments."""
    return split(replace(operator, arguments={"self": operator["input"], "dim": operator["axis"]}), algebra)


@rule("onnx.Concat")
def concat(operator: Operator, algebra: Algebra) -> Axes:
    """Lay operands end to end along one axis."""
    return cat(asking(operator, tensors=operator["inputs"], dim=operator["axis"]), algebra)


@rule("onnx.Pad")
def pad(operator: Operator, algebra: Algebra) -> Axes:
    """Add entries before and after an axis: which they are, its order says."""
    source = operator["data"]
    amounts = numbers(operator["pads"]) or ()
    dims = numbers(operator["axes"]) or tuple(range(len(source.shape)))
    axes = list(algebra[source])
    for dim, before, after in zip(dims, amounts[: len(dims)], amounts[len(dims) :], strict=True):
        if before or after:
            axes[dim] = _ordered(operator, algebra, axes[dim], axes[dim].size + before + after)
    return axes


@rule("onnx.Trilu", "onnx.CumSum")
def ordered(operator: Operator, algebra: Algebra) -> Axes:
    """Treat an entry by its place on an axis."""
    source = operator.inputs[0]
    dims = (-2, -1) if operator["axis"] is None else numbers(operator["axis"]) or ()
    axes = algebra[source]
    for dim in dims:
        algebra.pin(axes[dim], f"{operator.target} treats its units by their order")
    return list(axes)


def _ordered(operator: Operator, algebra: Algebra, axis: Layout, size: int) -> Layout:
    result = algebra.fresh([size])[0]
    for one in (axis, result):
        algebra.pin(one, f"{operator.target} treats its units by their order")
    return result
