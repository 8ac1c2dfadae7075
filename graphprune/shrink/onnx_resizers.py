"""How each ONNX operator that is told a size, or divides by one, is told the new size.

A resizer is registered for operators by name, as a rule is; operators without one follow their operands.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from graphprune.coupling.layout import Layout, find
from graphprune.coupling.rules.reshaping import bounds
from graphprune.shrink.onnx_resize import OnnxSizes

Resizer = Callable[[OnnxSizes, ir.Node], None]
_FAMILIES = ("graphprune.shrink.onnx_attention",)
"""Modules that register further resizers."""
_TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class _Entry:
    resizer: Resizer
    told: tuple[int, ...]


_RESIZERS: dict[str, _Entry] = {}


def resizer(*targets: str, told: Sequence[int] = ()) -> Callable[[Resizer], Resizer]:
    """Register a function that rewrites the operators named `targets`, such as ``onnx.Reshape``.

    Args:
        targets: Names, as the trace gives them.
        told: Positions of the operands that tell the operator sizes.
    """

    def register(function: Resizer) -> Resizer:
        _RESIZERS.update(dict.fromkeys(targets, _Entry(function, tuple(told))))
        return function

    return register


def resize_node(sizes: OnnxSizes, node: ir.Node, target: str) -> None:
    """Rewrite one operator, so that it computes the same on the units that are left.

    Args:
        sizes: What is known of the graph, in which all nodes before this one are done.
        node: The node.
        target: Its name in the traced graph.

    Raises:
        ShrinkError: If it cannot be told of the new sizes.
    """
    for family in _FAMILIES:
        importlib.import_module(family)
    entry = _RESIZERS.get(target)
    sizes.follow_operands(node, entry.told if entry else ())
    if entry:
        entry.resizer(sizes, node)


@resizer("onnx.Reshape", told=(1,))
def reshape(sizes: OnnxSizes, node: ir.Node) -> None:
    """Replace the entries of the shape whose axis shrinks; −1 stays, as does a 0 that copies the right size."""
    (output,), source = node.outputs, sizes.shape_now(node.inputs[0])
    if not sizes.touched(sizes.axes(output)):
        return
    told = sizes.numbers_now(node.inputs[1])
    copies = not node.attributes.get_int("allowzero", 0)
    changes = {}
    for place, (wanted, entry) in enumerate(zip(sizes.wanted(output), () if told is None else told)):
        is_copied = copies and entry == 0 and place < len(source)
        if entry != -1 and (source[place] if is_copied else entry) != wanted:
            changes[place] = wanted
    sizes.tell(node, 1, changes, scaling=not _is_concat(sizes.axes(output)))


@resizer("onnx.Expand", told=(1,))
def expand(sizes: OnnxSizes, node: ir.Node) -> None:
    """Replace the entries of the shape whose axis shrinks; what is 1 leaves the axis as it is."""
    (output,), told = node.outputs, sizes.numbers_now(node.inputs[1])
    wanted = sizes.wanted(output)
    if not sizes.touched(sizes.axes(output)):
        return
    entries = () if told is None else told
    offset = len(wanted) - len(entries)
    changes = {place: wanted[offset + place] for place, entry in enumerate(entries) if entry != 1}
    sizes.tell(node, 1, changes, scaling=not _is_concat(sizes.axes(output)))


@resizer("onnx.ConstantOfShape", told=(0,))
def constant_of_shape(sizes: OnnxSizes, node: ir.Node) -> None:
    """Make as many numbers as are wanted."""
    wanted = sizes.wanted(node.outputs[0])
    if wanted != sizes.shape_before(node.outputs[0]) or sizes.numbers_now(node.inputs[0]) is not None:
        sizes.tell(node, 0, dict(enumerate(wanted)), scaling=not _is_concat(sizes.axes(node.outputs[0])))


@resizer("onnx.Tile", told=(1,))
def tile(sizes: OnnxSizes, node: ir.Node) -> None:
    """Repeat as often as the result needs."""
    wanted, source = sizes.wanted(node.outputs[0]), sizes.shape_now(node.inputs[0])
    if sizes.touched(sizes.axes(node.outputs[0])):
        counts = [whole // part for whole, part in zip(wanted, source, strict=True)]
        sizes.tell(node, 1, dict(enumerate(counts)))


@resizer("onnx.Split", told=(1,))
def split(sizes: OnnxSizes, node: ir.Node) -> None:
    """Split by the sizes that the segments have now."""
    axis = node.attributes.get_int("axis", 0)
    lengths = [sizes.wanted(output)[axis] for output in node.outputs]
    if lengths == [sizes.shape_before(output)[axis] for output in node.outputs]:
        return
    if len(node.inputs) > 1:
        sizes.tell(node, 1, dict(enumerate(lengths)), scaling=False)
    elif sizes.opset < 13:
        node.attributes["split"] = ir.AttrInt64s("split", lengths)
    else:
        node.attributes.pop("num_outputs", None)
        node.resize_inputs(2)
        node.replace_input_with(1, sizes.constant(np.array(lengths, np.int64)))


@resizer("onnx.Slice", told=(1, 2))
def slice_(sizes: OnnxSizes, node: ir.Node) -> None:
    """Move the ends past the indices that are gone."""
    starts, ends, dims, steps = (
        sizes.numbers_before(node.inputs[place]) if place < len(node.inputs) else None
        for place in range(1, 5)
    )
    axes = sizes.axes(node.inputs[0], reader=node)
    if starts is None or ends is None or not sizes.touched(axes):
        return
    first, last = {}, {}
    for place, dim in enumerate(range(len(starts)) if dims is None else dims):
        axis = axes[int(dim)]
        if sizes.touches(axis):
            start, end = bounds(int(starts[place]), int(ends[place]), axis.size)
            kept, step = sizes.kept(axis), 1 if steps is None else int(steps[place])
            first[place] = int((kept < start).sum()) if step == 1 else start
            last[place] = _TO_THE_END if end == axis.size else int((kept < end).sum())
    sizes.tell(node, 1, first, scaling=False)
    sizes.tell(node, 2, last, scaling=False)


@resizer("onnx.Gather", told=(1,))
def gather(sizes: OnnxSizes, node: ir.Node) -> None:
    """Renumber known indices; names of units renumber themselves."""
    dim, known = node.attributes.get_int("axis", 0), sizes.numbers_before(node.inputs[1])
    axes = sizes.axes(node.inputs[0], reader=node)
    if known is None or known.ndim > 1 or not axes or not sizes.touches(axes[dim]):
        return
    axis = axes[dim]
    places = np.full(axis.size, -1)
    places[sizes.kept(axis)] = np.arange(sizes.size(axis))
    wanted = known if known.ndim == 0 else known[sizes.kept(sizes.axes(node.outputs[0])[dim])]
    node.replace_input_with(1, sizes.constant(places[wanted], node.inputs[1]))


@resizer("onnx.TopK", told=(1,))
def top_k(sizes: OnnxSizes, node: ir.Node) -> None:
    """Sort the units that are left, where all of them are sorted."""
    axis = node.attributes.get_int("axis", -1)
    sizes.tell(node, 1, {0: sizes.wanted(node.outputs[0])[axis]})


@resizer("onnx.Resize", told=(3,))
def resample(sizes: OnnxSizes, node: ir.Node) -> None:
    """Name the sizes that the other axes have now."""
    wanted = sizes.wanted(node.outputs[0])
    if len(node.inputs) > 3 and node.inputs[3] is not None and sizes.touched(sizes.axes(node.outputs[0])):
        named = node.attributes.get_ints("axes", None) or range(len(wanted))
        sizes.tell(node, 3, {place: wanted[axis] for place, axis in enumerate(named)})


@resizer("onnx.ReduceMean")
def mean(sizes: OnnxSizes, node: ir.Node) -> None:
    """Keep the divisor: a missing unit counts as zero."""
    before, now = sizes.shape_before(node.inputs[0]), sizes.shape_now(node.inputs[0])  # type: ignore[arg-type]
    given = sizes.numbers_now(node.inputs[1]) if len(node.inputs) > 1 else None
    dims = node.attributes.get_ints("axes", ()) if given is None else given.tolist()
    if not dims and not node.attributes.get_int("noop_with_empty_axes", 0):
        dims = range(len(before))
    ratio = prod(now[dim] / before[dim] for dim in dims)
    if ratio != 1:
        sizes.scale_result(node, ratio)


@resizer("onnx.RMSNormalization", "onnx.SimplifiedLayerNormalization")
@resizer("com.microsoft.SimplifiedLayerNormalization")
def rms_norm(sizes: OnnxSizes, node: ir.Node) -> None:
    """Keep the divisor of a norm whose weight is its second operand."""
    _keep_divisor(sizes, node, weight=1, first=node.attributes.get_int("axis", -1), epsilon=1e-5)


@resizer("com.microsoft.SkipSimplifiedLayerNormalization")
def skip_rms_norm(sizes: OnnxSizes, node: ir.Node) -> None:
    """Keep the divisor of a norm whose weight is its third operand."""
    _keep_divisor(sizes, node, weight=2, first=-1, epsilon=1e-12)


def _keep_divisor(sizes: OnnxSizes, node: ir.Node, *, weight: int, first: int, epsilon: float) -> None:
    """With n of n' units left, √(mean + epsilon) grows by √(n'/n) once epsilon does by n'/n."""
    axes = sizes.axes(node.inputs[0])[first:]
    ratio = prod(sizes.size(axis) for axis in axes) / prod(axis.size for axis in axes)
    if ratio == 1:
        return
    if any(output.uses() for output in node.outputs[1:3]):
        raise sizes.refused(node, "its statistics are read too")
    epsilon = node.attributes.get_float("epsilon", epsilon)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon / ratio)
    sizes.scale_operand(node, weight, ratio**-0.5)


@resizer("onnx.GroupNormalization")
def group_norm(sizes: OnnxSizes, node: ir.Node) -> None:
    """Keep the number of channels in a group."""
    axis, count = sizes.axes(node.inputs[0])[1], node.attributes.get_int("num_groups", 1)
    set_integer(node, "num_groups", sizes.size(axis) * count // axis.size)


@resizer("onnx.Conv")
def convolution(sizes: OnnxSizes, node: ir.Node) -> None:
    """Keep the number of channels in a group: one weight axis holds those of one group, its partner all."""
    _keep_channels(sizes, node, sizes.axes(node.inputs[0], reader=node))


@resizer("onnx.ConvTranspose")
def transposed_convolution(sizes: OnnxSizes, node: ir.Node) -> None:
    """Keep the number of channels in a group, likewise of the result."""
    _keep_channels(sizes, node, sizes.axes(node.outputs[0]))


def _keep_channels(sizes: OnnxSizes, node: ir.Node, axes: list[Layout]) -> None:
    if node.attributes.get_int("group", 1) != 1 and axes:
        set_integer(node, "group", sizes.size(axes[1]) // sizes.size(sizes.axes(node.inputs[1])[1]))


@resizer("com.microsoft.MatMulNBits", "com.microsoft.MatMulBnb4")
def quantized_matmul(sizes: OnnxSizes, node: ir.Node) -> None:
    """Say how many rows and columns the codes have now."""
    set_integer(node, "K", sizes.shape_now(node.inputs[0])[-1])
    set_integer(node, "N", sizes.wanted(node.outputs[0])[-1])


def set_integer(node: ir.Node, name: str, number: int) -> None:
    """Set a whole-number attribute."""
    node.attributes[name] = ir.AttrInt64(name, int(number))


def _is_concat(axes: list[Layout]) -> bool:
    return any(find(axis).form == "concat" for axis in axes)
