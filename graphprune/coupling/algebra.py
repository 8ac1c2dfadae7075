"""The primitives that operator rules are written with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from graphprune.coupling.layout import Layout, LayoutSolver
from graphprune.trace.graph import Operator, Value

Axes = list[Layout]
Side = Literal["produces", "consumes", "carries"]


class Algebra:
    """Layouts of all values met so far, and what an operator's rule may say about them.

    Attributes:
        solver: Where layouts live.
        sides: For axes of weights that a contraction touches: whether the operator produces its result along the
            axis, or consumes its input along it.
    """

    def __init__(self) -> None:
        self.solver = LayoutSolver()
        self.sides: dict[tuple[str, int], Side] = {}
        self._axes: dict[str, Axes] = {}
        self._operator = ""

    def enter(self, operator: Operator) -> None:
        """Name the operator that the demands to come belong to."""
        self._operator = operator.name

    def __getitem__(self, value: Value) -> Axes:
        """Return the layouts of a value's axes, made on first sight."""
        if value.name not in self._axes:
            self._axes[value.name] = self.fresh(value.shape)
        return self._axes[value.name]

    def __setitem__(self, value: Value, axes: Axes) -> None:
        self._axes[value.name] = axes

    def settle(self) -> None:
        """Hand what was said of composed axes, of activations too, down to the atoms that they are made of."""
        for axes in self._axes.values():
            self.solver.spread(axes)

    def known(self, name: str) -> Axes | None:
        """Return the layouts of the value called `name`, or None if no operator touched it."""
        return self._axes.get(name)

    def fresh(self, shape: Sequence[int]) -> Axes:
        """Return axes that are coupled with nothing yet."""
        return [self.solver.atom(size) for size in shape]

    def same(self, first: Layout, second: Layout) -> None:
        """Demand that two axes be equal."""
        self.solver.unify(first, second, self._operator)

    def contract(self, value: Value, axis: int, weight: Value, weight_axis: int) -> None:
        """Sum `value` against `weight` along an axis of each: equal layouts, gone from the result."""
        self.same(self[value][axis], self[weight][weight_axis])
        for operand, position in ((value, axis), (weight, weight_axis)):
            self._take_side(operand, position, "consumes")

    def produce(self, weight: Value, axis: int) -> Layout:
        """Return the axis of a weight along which the operator's result lies."""
        self._take_side(weight, axis, "produces")
        return self[weight][axis]

    def broadcast(self, values: Sequence[Value], shape: Sequence[int]) -> Axes:
        """Couple the axes of element-wise operands, aligned from the right; axes of size 1 drop out."""
        return self.align([(self[value], value.shape) for value in values], shape)

    def align(self, operands: Sequence[tuple[Axes, Sequence[int]]], shape: Sequence[int]) -> Axes:
        """Couple axes given with their sizes as broadcasting does, and return the result's."""
        result: Axes = []
        for distance in range(len(shape), 0, -1):
            met = [
                axes[-distance] for axes, sizes in operands if len(axes) >= distance and sizes[-distance] != 1
            ]
            for other in met[1:]:
                self.same(met[0], other)
            result.append(met[0] if met else self.solver.atom(shape[-distance]))
        return result

    def reshape(self, axes: Axes, shape: Sequence[int], target: Sequence[int]) -> Axes:
        """Factor axes of `shape` row-major into axes of `target`: atoms split, products merge."""
        result: dict[int, Layout] = {i: self.solver.atom(1) for i, size in enumerate(target) if size == 1}
        sources = [(axis, size) for axis, size in zip(axes, shape, strict=True) if size != 1]
        goals = [i for i, size in enumerate(target) if size != 1]
        while sources and goals:
            taken, reached = [sources.pop(0)], [goals.pop(0)]
            have, need = taken[0][1], target[reached[0]]
            while have != need:
                if have < need:
                    taken.append(sources.pop(0))
                    have *= taken[-1][1]
                else:
                    reached.append(goals.pop(0))
                    need *= target[reached[-1]]
            result.update(self._factor([axis for axis, _ in taken], reached, target))
        return [result[i] for i in range(len(target))]

    def split(self, axis: Layout, sizes: Sequence[int]) -> Axes:
        """Cut an axis into consecutive segments."""
        segments = [self.solver.atom(size) for size in sizes]
        if math.prod(sizes[1:], start=1) != 0 and len([s for s in sizes if s]) == 1:
            return [axis]
        self.same(self.solver.concat(segments), axis)
        return segments

    def concat(self, axes: Sequence[Layout]) -> Layout:
        """Lay axes end to end."""
        return self.solver.concat(axes)

    def pin(self, axis: Layout, reason: str) -> None:
        """Forbid to permute or remove units of an axis."""
        self.solver.pin(axis, reason)

    def block(self, axis: Layout, reason: str) -> None:
        """Forbid to remove units of an axis; they may still be permuted."""
        self.solver.block(axis, reason)

    def mark(self, axes: Sequence[Layout], mark: str) -> None:
        """Note what the operator does with these axes."""
        for axis in axes:
            if axis.size != 1:
                self.solver.mark(axis, mark)

    def opaque(self, operator: Operator) -> tuple[Axes, ...]:
        """Give up on an operator without a rule: everything that it touches is pinned, by its name."""
        reason = f"operator {operator.target} has no rule"
        outputs = tuple(self.fresh(value.shape) if value else [] for value in operator.outputs)
        for axes in (*(self[value] for value in operator.inputs), *outputs):
            for axis in axes:
                self.pin(axis, reason)
        return outputs

    def _factor(self, taken: Axes, reached: list[int], target: Sequence[int]) -> dict[int, Layout]:
        whole = self.solver.product(taken)
        if len(reached) == 1:
            return {reached[0]: whole}
        factors = {i: self.solver.atom(target[i]) for i in reached}
        self.same(self.solver.product(list(factors.values())), whole)
        return factors

    def _take_side(self, value: Value, axis: int, side: Side) -> None:
        if value.is_weight:
            self.sides[value.name, axis % len(value.shape)] = side
