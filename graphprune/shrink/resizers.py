"""How each operator that is told a size, or divides by one, is told the new size.

A resizer is registered for operators by name, as a rule is; operators without one follow their operands.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.reshaping import bounds
from graphprune.shrink.node_arguments import argument, set_argument
from graphprune.shrink.sizes import Sizes

Resizer = Callable[[Sizes, fx.Node], None]

_RESIZERS: dict[str, Resizer] = {}


def resizer(*targets: str) -> Callable[[Resizer], Resizer]:
    """Register a function that rewrites the operators named `targets`, such as ``aten.view`` with all overloads."""

    def register(function: Resizer) -> Resizer:
        _RESIZERS.update(dict.fromkeys(targets, function))
        return function

    return register


def resizer_for(target: str) -> Resizer | None:
    """Return what rewrites an operator, or None if it follows its operands."""
    return _RESIZERS.get(target) or _RESIZERS.get(target.rsplit(".", 1)[0].rstrip("_"))


@resizer("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.broadcast_to")
@resizer("aten.zeros", "aten.ones", "aten.full", "aten.empty")
@resizer("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")
def shape(sizes: Sizes, node: fx.Node) -> None:
    """Replace the entries of a shape argument whose axis shrinks."""
    name = next((n for n in ("size", "shape") if argument(node, n) is not None), None)
    if name is None:
        return
    axes = sizes.axes(node)
    if axes:
        old = argument(node, name)
        set_argument(node, name, [sizes.resized(size, axis, node) for size, axis in zip(old, axes)])


@resizer("aten.unflatten.int")
def unflatten(sizes: Sizes, node: fx.Node) -> None:
    """Replace the sizes that an axis is cut into."""
    wanted = list(argument(node, "sizes"))
    axes = sizes.axes(node)
    dim = argument(node, "dim") % (len(axes) - len(wanted) + 1)
    wanted = [sizes.resized(old, axis, node) for axis, old in zip(axes[dim:], wanted)]
    set_argument(node, "sizes", wanted)


@resizer("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.tensor_split")
@resizer("aten.unsafe_chunk", "aten.unsafe_split")
def split(sizes: Sizes, node: fx.Node) -> None:
    """Split by the sizes that the segments have now."""
    source, dim = node.args[0], argument(node, "dim")
    if not any(sizes.touches(axis) for axis in sizes.axes(source)):
        return
    segments = [sizes.axes(node, result=i)[dim] for i in range(len(node.meta["val"]))]
    told = argument(node, "split_sizes")
    lengths = [
        sizes.resized(old, segment, node)
        for old, segment in zip(told or (segment.size for segment in segments), segments)
    ]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (source, lengths, dim), {}


@resizer("aten.slice.Tensor", "aten.narrow")
def slice_(sizes: Sizes, node: fx.Node) -> None:
    """Move a slice's ends past the indices that are gone."""
    source, dim = node.args[0], argument(node, "dim") or 0
    axes = sizes.axes(source, reader=node)
    if not axes or not sizes.touches(axes[dim]) or argument(node, "step") not in (None, 1):
        return
    start, end = argument(node, "start"), argument(node, "end")
    if argument(node, "length") is not None:
        end = start + argument(node, "length")
    kept = sizes.kept(axes[dim])
    first, last = bounds(start, end, axes[dim].size)
    to_the_end = last == axes[dim].size  # wherever that is: the axis may hold the batch
    ends = int((kept < first).sum()), None if to_the_end else int((kept < last).sum())
    node.target = torch.ops.aten.slice.Tensor
    node.args, node.kwargs = (source, dim, *ends), {}


@resizer("aten.select.int")
def select(sizes: Sizes, node: fx.Node) -> None:
    """Move a single index past the indices that are gone."""
    source, dim, number = node.args[0], argument(node, "dim"), argument(node, "index")
    axes = sizes.axes(source, reader=node)
    if axes and sizes.touches(axes[dim]) and isinstance(number, int):
        (place,) = np.flatnonzero(sizes.kept(axes[dim]) == number % axes[dim].size)
        set_argument(node, "index", int(place))


@resizer("aten.index.Tensor")
def index(sizes: Sizes, node: fx.Node) -> None:
    """Renumber known indices."""
    axes, results = sizes.axes(node.args[0], reader=node), sizes.axes(node)
    indices = list(argument(node, "indices"))
    for dim, source in enumerate(indices):
        if isinstance(source, fx.Node) and axes and sizes.touches(axes[dim]):
            indices[dim] = _renumbered(sizes, source, axes[dim], results[dim])
    set_argument(node, "indices", indices)


@resizer("aten.index_select", "aten.embedding")
def index_select(sizes: Sizes, node: fx.Node) -> None:
    """Renumber known indices along one axis."""
    dim = argument(node, "dim") or 0
    axes, name = (
        sizes.axes(node.args[0], reader=node),
        "index" if argument(node, "index") is not None else "indices",
    )
    if axes and sizes.touches(axes[dim]):
        set_argument(node, name, _renumbered(sizes, argument(node, name), axes[dim], sizes.axes(node)[dim]))


def _renumbered(sizes: Sizes, source: fx.Node, axis: Any, result: Any) -> fx.Node:
    """Return the indices of what is left, as numbers of what is left; names of units renumber themselves."""
    known = sizes.numbers(source)
    if known is None or known.ndim != 1:
        return source
    wanted = np.where(known < 0, known + axis.size, known)[sizes.kept(result)]
    place = np.full(axis.size, -1)
    place[sizes.kept(axis)] = np.arange(sizes.size(axis))
    return sizes.constant(place[wanted], source)


@resizer("aten.repeat", "aten.tile", "aten.repeat_interleave.self_int")
def repeat(sizes: Sizes, node: fx.Node) -> None:
    """Repeat as often as the result needs."""
    before, after = sizes.axes(node.args[0], reader=node), sizes.axes(node)
    if not any(sizes.touches(axis) for axis in after):
        return
    name = next(n for n in ("repeats", "dims") if argument(node, n) is not None)
    old = argument(node, name)
    if isinstance(old, (int, fx.Node)):
        dim = argument(node, "dim")
        source, result = (before, after) if dim is None else ([before[dim]], [after[dim]])
        set_argument(node, name, _times(sizes, old, source, result, node))
        set_argument(node, "output_size", None)
        return
    new: list[list[Layout]] = [[]] * (len(after) - len(before))  # axes that the source does not have
    sources = [*new, *([axis] for axis in before)]
    pairs = zip(sources[-len(old) :], after[-len(old) :], strict=True)
    counts = [_times(sizes, count, source, [axis], node) for count, (source, axis) in zip(old, pairs)]
    set_argument(node, name, counts)


def _times(sizes: Sizes, old: Any, source: list[Layout], result: list[Layout], node: fx.Node) -> Any:
    """Return how often to repeat what is left of some axes for what is left of the result."""
    part = prod(sizes.size(axis) for axis in result) * prod(axis.size for axis in source)
    whole = prod(axis.size for axis in result) * prod(sizes.size(axis) for axis in source)
    return sizes.in_proportion(old, part, whole, node)


@resizer("aten.mean")
def mean(sizes: Sizes, node: fx.Node) -> None:
    """Keep the divisor: a missing unit counts as zero."""
    axes, dims = sizes.axes(node.args[0], reader=node), argument(node, "dim")
    averaged = [axes[dim] for dim in dims] if axes and dims else axes
    if averaged and sizes.ratio(averaged) != 1:
        sizes.scale(node, sizes.ratio(averaged))


@resizer("aten.rms_norm")
def rms_norm(sizes: Sizes, node: fx.Node) -> None:
    """Keep the divisor: with n of n' units left, √(mean + eps) grows by √(n'/n) once eps does by n'/n."""
    wanted = list(argument(node, "normalized_shape"))
    axes = sizes.axes(node.args[0], reader=node)[-len(wanted) :]
    if not any(sizes.touches(axis) for axis in axes):
        return
    ratio, eps = sizes.ratio(axes), argument(node, "eps")
    if eps is None:
        eps = torch.finfo(node.args[0].meta["val"].dtype).eps  # type: ignore[union-attr]
    set_argument(node, "normalized_shape", [sizes.size(axis) for axis in axes])
    set_argument(node, "eps", eps / ratio)
    sizes.scale(node, ratio**-0.5)


@resizer("aten.layer_norm")
def layer_norm(sizes: Sizes, node: fx.Node) -> None:
    """Take the widths that are left beside the normalised unit axes."""
    wanted = list(argument(node, "normalized_shape"))
    axes = sizes.axes(node.args[0], reader=node)[-len(wanted) :]
    set_argument(node, "normalized_shape", [sizes.size(axis) for axis in axes] or wanted)


@resizer("aten.group_norm")
def group_norm(sizes: Sizes, node: fx.Node) -> None:
    """Keep the number of channels in a group."""
    axes, count = sizes.axes(node.args[0], reader=node), argument(node, "num_groups")
    if axes and sizes.touches(axes[1]):
        set_argument(node, "num_groups", sizes.size(axes[1]) * count // axes[1].size)


@resizer("aten.scaled_dot_product_attention")
def attention(sizes: Sizes, node: fx.Node) -> None:
    """Write the scale down, before the width that it defaults to shrinks."""
    if argument(node, "scale") is None:
        width = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        node.update_kwarg("scale", width**-0.5)


@resizer(*(f"aten.conv{kind}{count}d" for kind in ("", "_transpose") for count in (1, 2, 3)))
def convolution(sizes: Sizes, node: fx.Node) -> None:
    """Keep the number of channels in a group: one weight axis holds those of one group, its partner all."""
    axes, rank = sizes.axes(node), len(node.args[1].meta["val"].shape)  # type: ignore[union-attr]
    if argument(node, "groups") == 1 or not axes:
        return
    transposed = "transpose" in str(node.target)
    channels = (axes if transposed else sizes.axes(node.args[0], reader=node))[1 - rank]
    of_group = sizes.axes(node.args[1], reader=node)[1]
    set_argument(node, "groups", sizes.size(channels) // sizes.size(of_group))


@resizer("aten.channel_shuffle")
def channel_shuffle(sizes: Sizes, node: fx.Node) -> None:
    """Shuffle the groups that are left."""
    axes, groups = sizes.axes(node.args[0], reader=node), argument(node, "groups")
    if axes and sizes.touches(axes[1]):
        left = np.unique(sizes.kept(axes[1]) // (axes[1].size // groups))
        set_argument(node, "groups", len(left))


@resizer("aten.histc")
def histogram(sizes: Sizes, node: fx.Node) -> None:
    """Count the units that are left."""
    (axis,) = sizes.axes(node)
    if sizes.touches(axis):
        set_argument(node, "bins", sizes.size(axis))
        set_argument(node, "max", sizes.size(axis) - 1)


@resizer("aten.one_hot")
def one_hot(sizes: Sizes, node: fx.Node) -> None:
    """Tell apart the units that are left."""
    axes = sizes.axes(node)
    if axes and sizes.touches(axes[-1]):
        set_argument(node, "num_classes", sizes.size(axes[-1]))
