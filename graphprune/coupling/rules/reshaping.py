"""Operators that move data without computing: views, permutations, slices, concatenations."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator, Value


def _only(operator: Operator) -> Value:
    return next(value for value in operator.outputs if value is not None)


@rule(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.unsqueeze.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
)
def view(operator: Operator, algebra: Algebra) -> Axes:
    """Row-major factoring from one shape to the other."""
    source = operator.inputs[0]
    return algebra.reshape(algebra[source], source.shape, _only(operator).shape)


@rule("aten.transpose.int")
def transpose(operator: Operator, algebra: Algebra) -> Axes:
    """Swap two axes."""
    axes = list(algebra[operator["self"]])
    first, second = operator["dim0"], operator["dim1"]
    axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("aten.t.default", "aten.numpy_T.default")
def reverse(operator: Operator, algebra: Algebra) -> Axes:
    """Reverse the order of the axes."""
    return algebra[operator["self"]][::-1]


@rule("aten.permute.default")
def permute(operator: Operator, algebra: Algebra) -> Axes:
    """Reorder the axes."""
    axes = algebra[operator["self"]]
    return [axes[dim] for dim in operator["dims"]]


@rule("aten.expand.default", "aten.broadcast_to.default", "aten.expand_as.default")
def expand(operator: Operator, algebra: Algebra) -> Axes:
    """Repeat axes of size 1: a free broadcast atom each."""
    source, output = operator["self"], _only(operator)
    axes = algebra[source]
    added = len(output.shape) - len(axes)
    result = algebra.fresh(output.shape)
    for position, (axis, size) in enumerate(zip(axes, source.shape, strict=True), start=added):
        if size == output.shape[position]:
            result[position] = axis
    algebra.mark([axis for axis in result if axis not in axes], "repeated")
    return result


@rule("aten.slice.Tensor")
def slice_(operator: Operator, algebra: Algebra) -> Axes:
    """Keep a consecutive segment; with a step, nothing can be said of the axis."""
    source = operator["self"]
    dim = (operator["dim"] or 0) % len(source.shape)
    size = source.shape[dim]
    start, end = bounds(operator["start"], operator["end"], size)
    axes = list(algebra[source])
    if operator["step"] not in (None, 1):
        algebra.pin(axes[dim], f"{operator.target} takes every {operator['step']}th index of it")
        axes[dim] = algebra.fresh([_only(operator).shape[dim]])[0]
        algebra.pin(axes[dim], f"{operator.target} takes every {operator['step']}th index of it")
    elif (start, end) != (0, size):
        sizes = [start, end - start, size - end]
        axes[dim] = algebra.split(axes[dim], sizes)[1] if end > start else algebra.fresh([0])[0]
    return axes


@rule(
    "aten.chunk.default",
    "aten.split.Tensor",
    "aten.split.sizes",
    "aten.split_with_sizes.default",
    "aten.tensor_split.sections",
)
def split(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Cut an axis into consecutive segments."""
    source = operator["self"]
    dim = (operator["dim"] or 0) % len(source.shape)
    axes = algebra[source]
    outputs = [value for value in operator.outputs if value is not None]
    segments = algebra.split(axes[dim], [value.shape[dim] for value in outputs])
    return tuple([*axes[:dim], segment, *axes[dim + 1 :]] for segment in segments)


@rule("aten.unbind.int", "aten.select.int")
def pick(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Read single indices of an axis, by number: its units have an order."""
    source = operator["self"]
    dim = (operator["dim"] or 0) % len(source.shape)
    axes = algebra[source]
    algebra.pin(axes[dim], f"{operator.target} reads its indices by number")
    return tuple([*axes[:dim], *axes[dim + 1 :]] for _ in operator.outputs)


@rule("aten.cat.default", "aten.concat.default")
def cat(operator: Operator, algebra: Algebra) -> Axes:
    """Lay operands end to end along one axis; their other axes are equal."""
    values = [value for value in operator["tensors"] if value.shape != (0,)]
    dim = (operator["dim"] or 0) % len(values[0].shape)
    axes = list(algebra[values[0]])
    for value in values[1:]:
        for position, axis in enumerate(algebra[value]):
            if position != dim:
                algebra.same(axes[position], axis)
    axes[dim] = algebra.concat([algebra[value][dim] for value in values])
    return axes


def bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """Return a slice's bounds as numbers from 0 to `size`."""
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)
