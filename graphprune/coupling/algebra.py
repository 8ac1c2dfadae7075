"""The primitives that operator rules are written with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graphprune.coupling.layout import Layout, LayoutSolver
from graphprune.trace.graph import Operator, OperatorGraph, Value

Axes = list[Layout]
Side = Literal["produces", "consumes", "carries", "selected"]
Meaning = Literal["units", "counts", "boundaries"]


@dataclass(frozen=True, slots=True)
class Names:
    """What the numbers of an integer tensor mean.

    Attributes:
        meaning: They name units of an axis, count how often each is named, or say where its rows end.
        axis: The axis.
    """

    meaning: Meaning
    axis: Layout


@dataclass(frozen=True, slots=True)
class Copy:
    """A value as one operator reads it: surgery may give each reader its own selection.

    Attributes:
        axes: The reader's layouts.
        made: Which layout of the value itself each part of them stands for, by the identity of the latter.
    """

    axes: Axes
    made: dict[int, Layout]


class Algebra:
    """Layouts of all values met so far, and what an operator's rule may say about them.

    What is computed without parameters (rotary angles, masks, slopes, index tables) is read through a copy of its
    layout by each operator that also reads something computed from parameters. So the rotary pairs of one layer are
    not bound to those of all others, and whatever built the tensor does not matter.

    Attributes:
        solver: Where layouts live.
        sides: For axes of weights that a contraction touches: whether the operator produces its result along the
            axis, or consumes its input along it.
        copies: What operators read through a copy, by the names of operator and value.
        sums: Axes that operators sum over, with all operands that are multiplied along each.
    """

    def __init__(self, graph: OperatorGraph) -> None:
        self.solver = LayoutSolver()
        self.sides: dict[tuple[str, int], Side] = {}
        self.copies: dict[tuple[str, str], Copy] = {}
        self.sums: list[tuple[str, tuple[tuple[Value, Layout], ...]]] = []
        self._axes: dict[str, Axes] = {}
        self._names: dict[str, Names] = {}
        self._understood: set[str] = set()
        self._weight_axes: dict[int, tuple[str, int]] = {}
        self._first_new = 0
        self._uses_parameters = False
        self._local: dict[str, Axes] = {}
        self._operator = ""
        self._dependence = graph.dependence
        self._readers = Counter(value.name for op in graph.operators for value in set(op.inputs))
        self._readers.update(value.name for value in graph.outputs)
        for value in graph.inputs:
            if value.name in graph.state_names:
                continue
            for position, axis in enumerate(self[value]):
                self.solver.anchor(axis)
                self.pin(axis, f"reaches the model's input '{value.name}' axis {position}")

    def enter(self, operator: Operator) -> None:
        """Name the operator that the demands to come belong to, and copy what it may read its own way."""
        self._operator = self.solver.operator = operator.name
        self._local = {}
        self._understood = set()
        self._first_new = len(self.solver.layouts)
        self._uses_parameters = self._reads_parameters(operator)
        if self._uses_parameters:
            for value in operator.sources:
                if value.name not in self._local and self._may_be_copied(value):
                    self._copy(operator, value)

    def leave(self, operator: Operator, outputs: Sequence[Axes], *, moves: bool) -> None:
        """Take the layouts of an operator's results.

        Args:
            operator: The one that was entered.
            outputs: Its results' axes.
            moves: Whether its result holds the numbers of its first operand as they are.
        """
        self._local = {}
        self._follow_names(operator, moves)
        from_inputs = not self._uses_parameters and any(
            value.name in self._dependence.on_inputs for value in operator.sources
        )
        for value, axes in zip(operator.outputs, outputs, strict=True):
            if value is None:
                continue
            self._axes[value.name] = axes
            for axis in axes:
                if from_inputs and any(self._is_new(atom) and atom.pins for atom in self.solver.atoms(axis)):
                    self.solver.anchor(axis)

    def is_activation(self, value: Value) -> bool:
        """Whether a value depends on the model's inputs: a weight, transposed or not, does not."""
        return value.name in self._dependence.on_inputs

    def is_read(self, value: Value | None) -> bool:
        """Whether an operator reads a value, or the model returns it."""
        return value is not None and self._readers[value.name] > 0

    def __getitem__(self, value: Value) -> Axes:
        """Return the layouts of a value's axes, made on first sight."""
        if value.name in self._local:
            return self._local[value.name]
        if value.name not in self._axes:
            axes = self._axes[value.name] = self.fresh(value.shape)
            if value.is_weight:
                self._weight_axes |= {axis.identity: (value.name, dim) for dim, axis in enumerate(axes)}
        return self._axes[value.name]

    def settle(self) -> None:
        """Hand what was said of composed axes, of activations too, down to the atoms that they are made of."""
        self.solver.settle()

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
        self.sum_over([(value, axis), (weight, weight_axis)])
        for operand, position in ((value, axis), (weight, weight_axis)):
            self.take_side(operand, position, "consumes")

    def sum_over(self, operands: Sequence[tuple[Value, int | Layout]]) -> None:
        """Note that the operator sums along an axis the product of `operands`: a missing unit must be zero in one."""
        axes = ((value, self[value][axis] if isinstance(axis, int) else axis) for value, axis in operands)
        self.sums.append((self._operator, tuple(axes)))

    def produce(self, weight: Value, axis: int) -> Layout:
        """Return the axis of a weight along which the operator's result lies."""
        self.take_side(weight, axis, "produces")
        return self[weight][axis]

    def take_side(self, value: Value, axis: int, side: Side) -> None:
        """Note on which side of a contraction a weight's axis is; a transposed weight counts as the weight."""
        if not self.is_activation(value):
            place = self._weight_axes.get(self[value][axis].identity)
            if place is not None:
                self.sides[place] = side

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

    def segment(self, axis: Layout, start: int, length: int) -> Layout:
        """Return a consecutive segment of an axis."""
        if length == axis.size:
            return axis
        sizes = [start, length, axis.size - start - length]
        return self.split(axis, sizes)[1] if length else self.solver.atom(0)

    def ordered(self, size: int, target: str) -> Layout:
        """Return a new axis whose units have an order."""
        axis = self.solver.atom(size)
        self.pin(axis, f"{target} orders its units")
        return axis

    def concat(self, axes: Sequence[Layout]) -> Layout:
        """Lay axes end to end."""
        return self.solver.concat(axes)

    def name(self, value: Value | None, meaning: Meaning, axis: Layout | None) -> None:
        """Note what the numbers in `value` mean: renumbered units of `axis` renumber or reorder them."""
        if value is not None and axis is not None:
            self._names[value.name] = Names(meaning, axis)

    def understand(self, value: Value, meaning: Meaning = "units") -> Layout | None:
        """Return the axis that a value's numbers tell of in this sense, which the operator then answers for."""
        names = self._names.get(value.name)
        if names is None or names.meaning != meaning:
            return None
        self._understood.add(value.name)
        return names.axis

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

    def opaque(self, operator: Operator, why: str) -> tuple[Axes, ...]:
        """Give up on an operator: everything that it touches is pinned, by its name."""
        reason = f"operator {operator.target} {why}"
        outputs = tuple(self.fresh(value.shape) if value else [] for value in operator.outputs)
        for axes in (*(self[value] for value in operator.inputs), *outputs):
            for axis in axes:
                self.pin(axis, reason)
        return outputs

    def _follow_names(self, operator: Operator, moves: bool) -> None:
        """Hand names on to what holds the same numbers; pin what is named where an operator minds the numbers."""
        for position, value in enumerate(operator.sources):
            names = self._names.get(value.name)
            if names is None or value.name in self._understood or operator.is_factory:
                continue
            if moves and position == 0:
                for output in operator.outputs:
                    self.name(output, names.meaning, names.axis)
            else:
                self.pin(names.axis, f"{operator.target} computes with the numbers of its units")

    def _reads_parameters(self, operator: Operator) -> bool:
        values = operator.outputs if operator.has_own_shape else operator.sources
        return any(value is not None and value.name in self._dependence.on_parameters for value in values)

    def _is_new(self, atom: Layout) -> bool:
        return atom.identity >= self._first_new

    def _may_be_copied(self, value: Value) -> bool:
        if value.name in self._dependence.on_parameters:
            return False
        return value.role in ("intermediate", "constant") or (
            value.role == "buffer" and self._readers[value.name] > 1
        )

    def _copy(self, operator: Operator, value: Value) -> None:
        made: dict[int, Layout] = {}
        axes = [self.solver.copy(axis, made) for axis in self[value]]
        self._local[value.name] = axes
        if made:
            self.copies[operator.name, value.name] = Copy(axes, made)

    def _factor(self, taken: Axes, reached: list[int], target: Sequence[int]) -> dict[int, Layout]:
        whole = self.solver.product(taken)
        if len(reached) == 1:
            return {reached[0]: whole}
        factors = {i: self.solver.atom(target[i]) for i in reached}
        self.same(self.solver.product(list(factors.values())), whole)
        return factors
