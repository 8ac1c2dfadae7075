"""Sizes written into a traced graph, recomputed from the layouts so that it runs on sliced weights."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.reshaping import bounds
from graphprune.coupling.selection import Indices, Selection
from graphprune.shrink.program import Program

# Operators that are told their result's shape, and under which argument.
_SHAPE_ARGUMENT = {
    "aten.view.default": 1,
    "aten.reshape.default": 1,
    "aten._unsafe_view.default": 1,
    "aten.expand.default": 1,
    "aten.broadcast_to.default": 1,
    "aten.zeros.default": 0,
    "aten.ones.default": 0,
    "aten.full.default": 0,
    "aten.new_zeros.default": 1,
    "aten.new_ones.default": 1,
    "aten.new_full.default": 1,
}
_SPLITS = ("aten.chunk.default", "aten.split.Tensor", "aten.split.sizes", "aten.split_with_sizes.default")

Resizer = Callable[["_Sizes", fx.Node], None]


def resize(program: Program, groups: NodeGroups, kept: Mapping[str, Indices]) -> Program:
    """Return a program that computes the same function on weights of which only some units are kept.

    Exact by construction: a mean keeps the divisor that it had, attention keeps its scale.

    Args:
        program: Of the graph that `groups` were read off; it is not changed.
        groups: The node groups.
        kept: Units that stay, by group name.
    """
    twin = copy.copy(program)
    twin.module = copy.deepcopy(program.module)
    sizes = _Sizes(groups, groups.selection(kept), {**program.weight_names})
    for node in list(twin.module.graph.nodes):
        target = str(node.target)
        if target in _SHAPE_ARGUMENT:
            sizes.reshape(node, _SHAPE_ARGUMENT[target])
        elif target in _SPLITS:
            sizes.split(node)
        elif target in _RESIZERS:
            _RESIZERS[target](sizes, node)
    twin.module.graph.lint()
    twin.module.recompile()
    return twin


class _Sizes:
    """What the layouts say of each node's size, before and after."""

    def __init__(self, groups: NodeGroups, selection: Selection, weight_names: dict[str, str]) -> None:
        self._groups = groups
        self._selection = selection
        self._names = {node: groups.graph.tied.get(name, name) for node, name in weight_names.items()}

    def axes(self, node: fx.Node, position: int | None = None) -> Sequence[Layout] | None:
        """Return the layouts of a node's axes; `position` picks one of several results."""
        if node.target is operator.getitem:
            node, position = node.args[0], node.args[1]  # type: ignore[assignment]
        name = self._names.get(node.name, node.name)
        return self._groups.axes(name if position is None else f"{name}:{position}")

    def kept(self, axis: Layout) -> Indices:
        """Return the indices of an axis that stay."""
        return self._groups.keep(axis, self._selection)

    def reshape(self, node: fx.Node, argument: int) -> None:
        """Replace the entries of a shape argument whose axis shrinks."""
        axes = self.axes(node)
        if axes is None:
            return
        shape = list(node.args[argument])  # type: ignore[arg-type]
        for position, axis in enumerate(axes):
            size = len(self.kept(axis))
            if size != axis.size and shape[position] != -1:
                shape[position] = size
        node.update_arg(argument, shape)

    def split(self, node: fx.Node) -> None:
        """Split by the sizes that the segments have now."""
        source = node.args[0]
        results = [self.axes(node, i) for i in range(len(node.meta["val"]))]
        dim = int(_argument(node, 2, "dim", 0))
        lengths = [len(self.kept(axes[dim])) for axes in results if axes is not None]
        node.target = torch.ops.aten.split_with_sizes.default
        node.args = (source, lengths, dim)
        node.kwargs = {}

    def slice(self, node: fx.Node) -> None:
        """Move a slice's ends past the indices that are gone."""
        source, dim = node.args[0], _argument(node, 1, "dim", 0)
        axes = self.axes(source) if isinstance(source, fx.Node) else None
        if axes is None or _argument(node, 4, "step", 1) != 1:
            return
        axis = axes[dim]
        kept = self.kept(axis)
        start, end = bounds(_argument(node, 2, "start", None), _argument(node, 3, "end", None), axis.size)
        node.args = (source, dim, int((kept < start).sum()), int((kept < end).sum()))
        node.kwargs = {}

    def mean(self, node: fx.Node) -> None:
        """Keep the divisor: a missing unit counts as zero."""
        source = node.args[0]
        axes = self.axes(source) if isinstance(source, fx.Node) else None
        dims: Sequence[int] = _argument(node, 1, "dim", ())
        if axes is None:
            return
        averaged = [axes[dim] for dim in dims] if dims else list(axes)
        before = math.prod(axis.size for axis in averaged)
        after = math.prod(len(self.kept(axis)) for axis in averaged)
        if after != before:
            graph = node.graph
            with graph.inserting_after(node):
                scaled = graph.call_function(torch.ops.aten.mul.Scalar, (node, after / before))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    def attention(self, node: fx.Node) -> None:
        """Write the scale down, before the width that it defaults to shrinks."""
        if node.kwargs.get("scale") is None and len(node.args) < 7:
            width = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
            node.kwargs = {**node.kwargs, "scale": width**-0.5}

    def convolution(self, node: fx.Node) -> None:
        """Keep one group for each channel of a depth-wise convolution."""
        count = _argument(node, 6, "groups", 1)
        axes = self.axes(node)
        if count != 1 and axes is not None:
            node.update_arg(6, len(self.kept(axes[1])))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return default if value is None else value


_RESIZERS: dict[str, Resizer] = {
    "aten.slice.Tensor": _Sizes.slice,
    "aten.mean.dim": _Sizes.mean,
    "aten.scaled_dot_product_attention.default": _Sizes.attention,
    "aten.conv1d.default": _Sizes.convolution,
    "aten.conv2d.default": _Sizes.convolution,
    "aten.conv3d.default": _Sizes.convolution,
}
