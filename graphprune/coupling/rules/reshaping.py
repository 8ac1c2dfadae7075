"""Operators that move data without computing: views, permutations, slices, concatenations, repetitions."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import DynamicSize, Operator, Value

_MANY = 64  # single indices, beyond which an axis is left alone


def _only(operator: Operator) -> Value:
    return next(value for value in operator.outputs if value is not None)


@rule(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten._reshape_alias",
    "aten.flatten",
    "aten.unflatten",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.ravel",
    vanishes="first",
    moves=True,
)
def view(operator: Operator, algebra: Algebra) -> Axes:
    """Row-major factoring from one shape to the other."""
    source = operator.inputs[0]
    return algebra.reshape(algebra[source], source.shape, _only(operator).shape)


@rule("aten.view_as", "aten.reshape_as", vanishes="first", moves=True)
def view_as(operator: Operator, algebra: Algebra) -> Axes:
    """Factor likewise; the shape is another value's, and shrinks with it."""
    return _shaped_like(operator["other"], view(operator, algebra), algebra)


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims", vanishes="first", moves=True)
def transpose(operator: Operator, algebra: Algebra) -> Axes:
    """Swap two axes."""
    axes = list(algebra[operator["self"]])
    first, second = (dim for dim in operator.arguments.values() if isinstance(dim, int))
    axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("aten.t", "aten.numpy_T", vanishes="first", moves=True)
def reverse(operator: Operator, algebra: Algebra) -> Axes:
    """Reverse the order of the axes."""
    return algebra[operator["self"]][::-1]


@rule("aten.mT", "aten.mH", "aten.adjoint", "aten.matrix_H", vanishes="first", moves=True)
def transpose_matrices(operator: Operator, algebra: Algebra) -> Axes:
    """Swap the last two axes."""
    *batch, rows, columns = algebra[operator["self"]]
    return [*batch, columns, rows]


@rule("aten.permute", vanishes="first", moves=True)
def permute(operator: Operator, algebra: Algebra) -> Axes:
    """Reorder the axes."""
    axes = algebra[operator["self"]]
    return [axes[dim] for dim in operator["dims"]]


@rule("aten.movedim", "aten.moveaxis", vanishes="first", moves=True)
def move_axes(operator: Operator, algebra: Algebra) -> Axes:
    """Move some axes to other places; the others keep their order."""
    axes = algebra[operator["self"]]
    sources, targets = (
        item if isinstance(item, tuple) else (item,) for item in list(operator.arguments.values())[1:]
    )
    taken = [int(source) % len(axes) for source in sources]  # type: ignore[arg-type]
    rest = [axis for dim, axis in enumerate(axes) if dim not in taken]
    for target, source in sorted(zip((int(t) % len(axes) for t in targets), taken)):  # type: ignore[arg-type]
        rest.insert(target, axes[source])
    return rest


@rule("aten.expand", "aten.broadcast_to", vanishes="first", moves=True)
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


@rule("aten.expand_as", vanishes="first", moves=True)
def expand_as(operator: Operator, algebra: Algebra) -> Axes:
    """Repeat likewise; the shape is another value's, and shrinks with it."""
    return _shaped_like(operator["other"], expand(operator, algebra), algebra)


@rule("aten.repeat", "aten.tile", vanishes="first", moves=True)
def repeat(operator: Operator, algebra: Algebra) -> Axes:
    """Lay copies end to end: copies × axis."""
    source, output = operator["self"], _only(operator)
    axes = [*algebra.fresh([1] * (len(output.shape) - len(source.shape))), *algebra[source]]
    return [
        _repeated(algebra, axis, size, copies_first=True)
        for axis, size in zip(axes, output.shape, strict=True)
    ]


@rule("aten.repeat_interleave.self_int", vanishes="first", moves=True)
def repeat_interleave(operator: Operator, algebra: Algebra) -> Axes:
    """Repeat each index where it stands: axis × copies."""
    source, output = operator["self"], _only(operator)
    if operator["dim"] is None:
        (whole,) = algebra.reshape(algebra[source], source.shape, [_size(source)])
        return [_repeated(algebra, whole, output.shape[0], copies_first=False)]
    axes = list(algebra[source])
    dim = operator["dim"]
    axes[dim] = _repeated(algebra, axes[dim], output.shape[dim], copies_first=False)
    return axes


@rule("aten.slice", "aten.narrow", vanishes="first", moves=True)
def slice_(operator: Operator, algebra: Algebra) -> Axes:
    """Keep a consecutive segment, or every n-th index."""
    source, output = operator["self"], _only(operator)
    dim = (operator["dim"] or 0) % len(source.shape)
    size, step = source.shape[dim], operator["step"] or 1
    start, end = bounds(operator["start"], _end(operator), size)
    axes = list(algebra[source])
    if step != 1:
        axes[dim] = _every(operator, algebra, axes[dim], start, step)
    elif (start, end) != (0, size):
        if isinstance(operator["start"], DynamicSize) or isinstance(_end(operator), DynamicSize):
            algebra.pin(axes[dim], f"{operator.target} cuts it where the inputs' sizes say")
        axes[dim] = algebra.segment(axes[dim], start, end - start)
    if axes[dim].size != output.shape[dim]:
        algebra.pin(axes[dim], f"{operator.target} cuts it where the inputs' sizes say")
        axes[dim] = algebra.ordered(output.shape[dim], operator.target)
    return axes


@rule(
    "aten.chunk",
    "aten.split",
    "aten.split_with_sizes",
    "aten.tensor_split",
    "aten.unsafe_chunk",
    "aten.unsafe_split",
    vanishes="first",
    moves=True,
)
def split(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Cut an axis into consecutive segments."""
    source = operator["self"]
    dim = (operator["dim"] or 0) % len(source.shape)
    axes = algebra[source]
    outputs = [value for value in operator.outputs if value is not None]
    segments = algebra.split(axes[dim], [value.shape[dim] for value in outputs])
    return tuple([*axes[:dim], segment, *axes[dim + 1 :]] for segment in segments)


@rule("aten.select", "aten.unbind", vanishes="first", moves=True)
def pick(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Read single indices of an axis: what is read becomes a segment of its own."""
    source = operator["self"]
    dim = (operator["dim"] or 0) % len(source.shape)
    axes, size = algebra[source], source.shape[dim]
    number = operator["index"]
    if isinstance(number, (Value, DynamicSize)) or size > _MANY:
        algebra.pin(axes[dim], f"{operator.target} reads its units by number")
    else:
        for position in range(size) if number is None else [number % size]:
            algebra.segment(axes[dim], position, 1)
    return tuple([*axes[:dim], *axes[dim + 1 :]] for _ in operator.outputs)


@rule("aten.cat", "aten.concat", "aten.concatenate", vanishes="each")
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


@rule("aten.stack", vanishes="each")
def stack(operator: Operator, algebra: Algebra) -> Axes:
    """Lay operands side by side along a new axis."""
    values, output = operator["tensors"], _only(operator)
    axes = list(algebra[values[0]])
    for value in values[1:]:
        for mine, other in zip(axes, algebra[value], strict=True):
            algebra.same(mine, other)
    axes.insert((operator["dim"] or 0) % len(output.shape), algebra.concat(algebra.fresh([1] * len(values))))
    return axes


@rule("aten.pixel_shuffle", vanishes="first", moves=True)
def pixel_shuffle(operator: Operator, algebra: Algebra) -> Axes:
    """Turn (channels · r · r, h, w) into (channels, h · r, w · r)."""
    source, factor = operator["self"], operator["upscale_factor"]
    *batch, channels, height, width = algebra[source]
    size = source.shape[-3]
    kept, down, across = algebra.reshape([channels], [size], [size // factor**2, factor, factor])
    for axis in (down, across):
        algebra.pin(axis, f"{operator.target} lays its units side by side")
    return [*batch, kept, algebra.solver.product([height, down]), algebra.solver.product([width, across])]


@rule("aten.pixel_unshuffle", vanishes="first", moves=True)
def pixel_unshuffle(operator: Operator, algebra: Algebra) -> Axes:
    """Turn (channels, h · r, w · r) into (channels · r · r, h, w)."""
    source, factor = operator["self"], operator["downscale_factor"]
    *batch, channels, tall, wide = algebra[source]
    height, down = algebra.reshape([tall], [tall.size], [tall.size // factor, factor])
    width, across = algebra.reshape([wide], [wide.size], [wide.size // factor, factor])
    for axis in (tall, wide):
        algebra.pin(axis, f"{operator.target} lays its units side by side")
    return [*batch, algebra.solver.product([channels, down, across]), height, width]


@rule("aten.channel_shuffle", "aten.native_channel_shuffle", vanishes="first", moves=True)
def channel_shuffle(operator: Operator, algebra: Algebra) -> Axes:
    """Turn channels = groups × rest into rest × groups."""
    source, groups = operator["self"], operator["groups"]
    batch, channels, *positions = algebra[source]
    outer, inner = algebra.reshape([channels], [channels.size], [groups, channels.size // groups])
    return [batch, algebra.solver.product([inner, outer]), *positions]


def bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """Return a slice's bounds as numbers from 0 to `size`."""
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


def _end(operator: Operator) -> int | None:
    length = operator["length"]
    return operator["end"] if length is None else operator["start"] + length


def _every(operator: Operator, algebra: Algebra, axis: Layout, start: int, step: int) -> Layout:
    """Return every n-th index of an axis: axis = result × n, of which one is read."""
    size, taken = axis.size, _only(operator).shape[operator["dim"] or 0]
    if size % step or taken * step != size:
        algebra.pin(axis, f"{operator.target} takes every {step}th index of it")
        return algebra.ordered(taken, operator.target)
    result, phase = algebra.reshape([axis], [size], [taken, step])
    if phase.size > 1:
        algebra.segment(phase, start % step, 1)
    return result


def _repeated(algebra: Algebra, axis: Layout, size: int, *, copies_first: bool) -> Layout:
    if size == axis.size:
        return axis
    (copies,) = algebra.fresh([size // axis.size])
    algebra.mark([copies], "repeated")
    return algebra.solver.product([copies, axis] if copies_first else [axis, copies])


def _shaped_like(other: Value, axes: Axes, algebra: Algebra) -> Axes:
    for mine, theirs in zip(axes, algebra[other], strict=True):
        algebra.same(mine, theirs)
    return axes


def _size(value: Value) -> int:
    total = 1
    for size in value.shape:
        total *= size
    return total
