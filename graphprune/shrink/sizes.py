"""What the layouts say of the axes of a traced graph's nodes, before and after units go."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import fx

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout, atoms_of, find
from graphprune.coupling.selection import Indices, Selection


class Sizes:
    """What the layouts say of each node's axes, before and after.

    Args:
        module: The graph that is being rewritten; selections become buffers of it.
        groups: The node groups.
        selection: Units that stay, by atom.
        weight_names: Qualified names of weights by the name of their node.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        groups: NodeGroups,
        selection: Selection,
        weight_names: Mapping[str, str],
    ) -> None:
        self._module = module
        self._groups = groups
        self._selection = selection
        self._names = {node: groups.graph.tied.get(name, name) for node, name in weight_names.items()}
        self._constants: dict[bytes, fx.Node] = {}
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._known = {
            value.name: value.content
            for read in groups.graph.operators
            for value in read.inputs
            if value.content is not None
        }

    def value_name(self, node: fx.Node) -> str:
        """Return the name that the operator graph has for what a node returns."""
        node = self._replaced.get(node, node)
        if node.target is operator.getitem:
            return f"{node.args[0].name}:{node.args[1]}"  # type: ignore[union-attr]
        return self._names.get(node.name, node.name)

    def axes(self, node: Any, *, reader: fx.Node | None = None, result: int | None = None) -> list[Layout]:
        """Return the layouts of a node's axes.

        Args:
            node: The node; anything else has no axes.
            reader: An operator that may read it through a copy.
            result: Which of several results.
        """
        if not isinstance(node, fx.Node):
            return []
        name = self.value_name(node) if result is None else f"{node.name}:{result}"
        copies = self._groups.read(reader.name) if reader is not None else {}
        return copies.get(name) or self._groups.axes(name) or []

    def touches(self, axis: Layout) -> bool:
        """Whether units of an axis go, or change places."""
        return any(atom.identity in self._selection for atom in atoms_of(axis))

    def kept(self, axis: Layout) -> Indices:
        """Return the indices of an axis that stay."""
        return self._groups.keep(axis, self._selection)

    def size(self, axis: Layout) -> int:
        """Return how many indices of an axis stay."""
        return len(self.kept(axis)) if self.touches(axis) else axis.size

    def resized(self, old: Any, axis: Layout, node: fx.Node) -> Any:
        """Return what stands for the size of an axis in an operator's arguments, after the removal.

        A number becomes another number, and −1 stays. Where the size follows from the inputs' sizes (batch × heads),
        the result does too.

        Args:
            old: What stands there: a number, or a node that computes it.
            axis: The axis.
            node: The operator.
        """
        if not self.touches(axis) or old == -1:
            return old
        if not isinstance(old, fx.Node):
            return self.size(axis)
        if find(axis).form == "concat":
            return self.computed(operator.sub, old, axis.size - self.size(axis), node)
        return self.in_proportion(old, self.size(axis), axis.size, node)

    def in_proportion(self, old: Any, part: int, whole: int, node: fx.Node) -> Any:
        """Return `old` × `part` / `whole`, for a number or for a node in front of `node` that computes it."""
        divisor = math.gcd(part, whole)
        scaled = self.computed(operator.mul, old, part // divisor, node)
        return self.computed(operator.floordiv, scaled, whole // divisor, node)

    def computed(self, function: Any, old: Any, number: int, node: fx.Node) -> Any:
        """Return `function` of `old` and a number, of numbers at once and of nodes when the graph runs."""
        if not isinstance(old, fx.Node):
            return function(old, number)
        neutral = 0 if function is operator.sub else 1
        if number == neutral:
            return old
        with self._module.graph.inserting_before(node):
            return self._module.graph.call_function(function, (old, number))

    def ratio(self, axes: Sequence[Layout]) -> float:
        """Return which share of the product of some axes stays."""
        return math.prod(self.size(axis) for axis in axes) / math.prod(axis.size for axis in axes)

    def numbers(self, node: fx.Node) -> Indices | None:
        """Return what an integer tensor holds, where that is known from the graph alone."""
        return self._known.get(self.value_name(node))

    def constant(self, numbers: Indices, like: fx.Node) -> fx.Node:
        """Return a node that holds known numbers, made once."""
        key = numbers.tobytes() + str(numbers.shape).encode()
        if key not in self._constants:
            name = self._new_name()
            device = like.meta["val"].device if "val" in like.meta else "cpu"
            tensor = torch.as_tensor(np.ascontiguousarray(numbers), device=device)
            self._module.register_buffer(name, tensor, persistent=False)
            first = next(iter(self._module.graph.nodes))
            with self._module.graph.inserting_before(first):
                self._constants[key] = self._module.graph.get_attr(name)
            self._constants[key].meta["val"] = tensor
        return self._constants[key]

    def _new_name(self) -> str:
        """Return a buffer's name that nothing has, what an earlier surgery left included."""
        taken = {*self._names.values(), *(name for name, _ in self._module.named_buffers())}
        return next(name for number in count() if (name := f"_selection_{number}") not in taken)

    def scale(self, node: fx.Node, factor: float) -> None:
        """Multiply what a node returns, for all its readers."""
        graph = self._module.graph
        with graph.inserting_after(node):
            scaled = graph.call_function(torch.ops.aten.mul.Scalar, (node, factor))
        scaled.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        self._replaced[scaled] = node

    def select_operands(self, node: fx.Node) -> None:
        """Let an operator read a selection of what it reads through a copy."""
        copies = self._groups.read(node.name)
        for source in node.all_input_nodes if copies else ():
            for dim, axis in enumerate(copies.get(self.value_name(source), ())):
                if self.touches(axis):
                    chosen = self._chosen(source, dim, axis, node)
                    chosen.meta["val"] = source.meta.get("val")
                    node.replace_input_with(source, chosen)
                    source = chosen

    def _chosen(self, source: fx.Node, dim: int, axis: Layout, node: fx.Node) -> fx.Node:
        """Return what stays of one axis, where the inputs' own factors of it (the batch) may have any size."""
        aten, outer, inner, after = torch.ops.aten, *self._around(axis)
        if not any(atom.anchored for factor in (*outer, *after) for atom in atoms_of(factor)):
            return self._call(
                node, aten.index_select.default, source, dim, self.constant(self.kept(axis), source)
            )
        sizes = [math.prod(factor.size for factor in run) for run in (outer, inner, after)]
        sizes[0 if any(atom.anchored for factor in outer for atom in atoms_of(factor)) else 2] = -1
        kept = self.constant(self._kept_of_product(inner), source)
        apart = self._call(node, aten.unflatten.int, source, dim, sizes)
        chosen = self._call(node, aten.index_select.default, apart, dim + 1, kept)
        return self._call(node, aten.flatten.using_ints, chosen, dim, dim + 2)

    def _call(self, before: fx.Node, target: Any, *arguments: Any) -> fx.Node:
        with self._module.graph.inserting_before(before):
            return self._module.graph.call_function(target, arguments)

    def _around(self, axis: Layout) -> tuple[list[Layout], list[Layout], list[Layout]]:
        """Return the factors of an axis before, between and after those that units of go."""
        factors = self._groups.factors(axis)
        touched = [place for place, factor in enumerate(factors) if self.touches(factor)]
        first, last = touched[0], touched[-1] + 1
        return factors[:first], factors[first:last], factors[last:]

    def _kept_of_product(self, factors: Sequence[Layout]) -> Indices:
        kept = np.zeros(1, dtype=np.int64)
        for factor in factors:
            kept = (kept[:, None] * factor.size + self.kept(factor)).ravel()
        return kept
