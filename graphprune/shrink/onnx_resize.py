"""What the layouts say of each value in an ONNX graph, before and after, and how a graph is told of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout, atoms_of
from graphprune.coupling.selection import Indices
from graphprune.errors import OperatorShrinkError, ShrinkError
from graphprune.shrink.onnx_weights import numbers_in, set_numbers
from graphprune.trace.graph import Operator
from graphprune.trace.onnx import named_nodes
from graphprune.trace.onnx_shapes import Known, ShapeInference, known_of_tensor
from graphprune.trace.onnx_sizes import sizes_of_shapes

Shape = tuple[int, ...]


class OnnxSizes:
    """The sizes of a graph that is being rewritten, node by node in order, at the example sizes of its trace.

    Args:
        model: A copy of the graph that `groups` were read off, its weights cut.
        groups: The node groups.
        kept: Units that stay, in their new order, by group name.
    """

    def __init__(self, model: ir.Model, groups: NodeGroups, kept: Mapping[str, Indices]) -> None:
        self._graph = model.graph
        self._groups = groups
        self._selection = groups.selection(kept)
        self._origins: dict[ir.Value, str] = {}
        self._selected: dict[tuple[ir.Value, int, bytes], ir.Value] = {}
        self._operators = {node: name for name, node in named_nodes(model.graph)}
        self._counter = itertools.count()
        self._names = {value.name for node in model.graph for value in node.outputs}
        self._names |= {*model.graph.initializers, *(value.name for value in model.graph.inputs)}
        shapes = {value.name: value.shape for value in groups.graph.inputs}
        original: ir.Model = groups.graph.program
        self._example = sizes_of_shapes(original, shapes)
        before = ShapeInference(original, self._example)
        before.run()
        self._before = {value.name: known for value, known in before.known.items() if value.name}
        self._shapes = ShapeInference(model, self._example)
        self._shapes.start()
        self.opset = model.opset_imports.get("", 1)
        for value in model.graph.inputs:
            if value.name in groups.graph.state_names:
                self._shapes.known[value] = Known(self.wanted(value), value.dtype or ir.DataType.UNDEFINED)

    def axes(self, value: ir.Value | None, *, reader: ir.Node | None = None) -> list[Layout]:
        """Return the layouts of a value's axes, as it is or as an operator reads it; none if nothing is known."""
        name = self.name(value)
        copies = self._groups.read(self._operators[reader]) if reader is not None else {}
        return copies.get(name) or self._groups.axes(name) or []

    def name(self, value: ir.Value | None) -> str:
        """Return the name that a value, or the one that it was made of, has in the traced graph."""
        return "" if value is None else self._origins.get(value, value.name or "")

    def touches(self, axis: Layout) -> bool:
        """Whether units of an axis go, or change places."""
        return any(atom.identity in self._selection for atom in atoms_of(axis))

    def touched(self, axes: Sequence[Layout]) -> bool:
        """Whether units of any of some axes do."""
        return any(self.touches(axis) for axis in axes)

    def kept(self, axis: Layout) -> Indices:
        """Return the indices of an axis that stay."""
        return self._groups.keep(axis, self._selection)

    def size(self, axis: Layout) -> int:
        """Return how many indices of an axis stay."""
        return len(self.kept(axis)) if self.touches(axis) else axis.size

    def wanted(self, value: ir.Value) -> Shape:
        """Return the shape that a value must have."""
        axes = self._groups.axes(self.name(value))
        return self.shape_before(value) if axes is None else tuple(self.size(axis) for axis in axes)

    def shape_before(self, value: ir.Value) -> Shape:
        """Return the shape that a value had."""
        known = self._before.get(self.name(value))
        return (known.shape if known else None) or ()

    def shape_now(self, value: ir.Value | None) -> Shape:
        """Return the shape that a value has, as far as the graph is rewritten."""
        known = None if value is None else self._shapes.known.get(value)
        return (known.shape if known else None) or ()

    def numbers_before(self, value: ir.Value | None) -> NDArray[Any] | None:
        """Return the numbers that a value had, where they follow from sizes and small constants."""
        known = self._before.get(self.name(value))
        return known.content if known else None

    def numbers_now(self, value: ir.Value | None) -> NDArray[Any] | None:
        """Return the numbers that a value has."""
        known = None if value is None else self._shapes.known.get(value)
        return known.content if known else None

    def infer(self, node: ir.Node, operator: Operator | None) -> None:
        """Find out what shapes a node's results have, and check that they are those that are wanted.

        Args:
            node: A node whose operands are all as they will be.
            operator: What the trace made of it; None if its results follow from sizes and constants.

        Raises:
            ShrinkError: If a result would have another shape, or its shape is told by numbers that are not known.
        """
        self._shapes.infer(node)
        if operator is None:
            return
        for output in node.outputs:
            if not output.name:
                continue
            wanted, found = self.wanted(output), self._shapes.known[output]
            if not self._shapes.is_certain(node) or found.shape is None or not found.certain:
                self._shapes.known[output] = Known(wanted, found.dtype)
            elif found.shape != wanted:
                raise ShrinkError(
                    f"the ONNX node '{self._operators[node]}' ({node.op_type}) does not follow the smaller weights: "
                    f"its result '{output.name}' would have the shape {found.shape}, not {wanted}",
                    "leave the groups that reach it out of the plan, and report this model",
                )

    def refused(self, node: ir.Node, why: str) -> OperatorShrinkError:
        """Return the error for an operator that cannot be told of the new sizes."""
        return OperatorShrinkError(
            self._operators[node],
            f"the ONNX node '{self._operators[node]}' ({node.op_type}) cannot follow the smaller weights: {why}",
            "leave the groups that reach it out of the plan",
        )

    def follow_operands(self, node: ir.Node, told: Sequence[int]) -> None:
        """Let a node read of each operand what it needs of it: what is left, of the numbers that it had.

        What is read through a copy is selected. A number that followed from a size, such as a scale that is computed
        from the width of a head or the divisor of a mean, is that of the whole model.

        Args:
            node: The node.
            told: Positions of operands that tell it sizes, which are another matter.
        """
        copies = self._groups.read(self._operators[node])
        for position, value in enumerate(node.inputs):
            if value is None or position in told:
                continue
            axes = [
                (dim, axis) for dim, axis in enumerate(copies.get(self.name(value), ())) if self.touches(axis)
            ]
            before, now = self.numbers_before(value), self.numbers_now(value)
            if before is not None and now is not None and not np.array_equal(before, now):
                for dim, axis in axes:
                    before = np.take(before, self.kept(axis), axis=dim)
                if not np.array_equal(before, now):
                    self._restore(node, position, value, before)
            else:
                for dim, axis in axes:
                    value = self._chosen(node, value, dim, axis)
                    node.replace_input_with(position, value)

    def _restore(self, node: ir.Node, position: int, value: ir.Value, numbers: NDArray[Any]) -> None:
        if not self.is_static(value):
            raise self.refused(node, f"it computes with '{value.name}', a size that changes")
        node.replace_input_with(position, self.constant(numbers, value))

    def is_static(self, value: ir.Value | None) -> bool:
        """Whether the numbers that a value had are the same for all sizes of the inputs."""
        name = self.name(value)
        others, before = self._elsewhere.get(name), self._before.get(name)
        return (
            others is not None
            and before is not None
            and others.content is not None
            and before.content is not None
            and np.array_equal(others.content, before.content)
        )

    @cached_property
    def _elsewhere(self) -> dict[str | None, Known]:
        """What was known of the values at other sizes of the inputs."""
        original = ShapeInference(self._groups.graph.program, self._example.others())
        original.run()
        return {value.name: known for value, known in original.known.items()}

    def constant(self, numbers: Any, like: ir.Value | None = None) -> ir.Value:
        """Return a new initializer.

        Args:
            numbers: What it holds.
            like: A value whose type it takes, and in whose place it stands for the layouts.
        """
        known = self._shapes.known.get(like) if like is not None else None
        array = np.asarray(numbers)
        if known is not None and known.dtype != ir.DataType.UNDEFINED:
            array = array.astype(known.dtype.numpy())
        name = self._new_name()
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        self._shapes.known[value] = known_of_tensor(value)
        if like is not None:
            self._origins[value] = self.name(like)
        return value

    def tell(self, node: ir.Node, position: int, changes: Mapping[int, int], *, scaling: bool = True) -> None:
        """Change some numbers of an operand that tells a node sizes.

        Where the operand is computed from the inputs' sizes, what is computed is scaled or shifted, such that it is
        right for all of them. Nothing that other nodes read is changed.

        Args:
            node: The node.
            position: Of the operand.
            changes: The right number at the example sizes, by place in the operand.
            scaling: Whether a number that follows from the inputs' sizes is scaled, or shifted.
        """
        value = node.inputs[position]
        now = self.numbers_now(value)
        if value is None or now is None:
            raise self.refused(node, "its sizes are known only when the model runs")
        flat = now.reshape(-1).astype(np.int64)
        changes = {place: number for place, number in changes.items() if int(flat[place]) != number}
        if not changes:
            return
        wanted = flat.copy()
        wanted[list(changes)] = list(changes.values())
        if ir.convenience.get_const_tensor(value) is not None or self.is_static(value):
            node.replace_input_with(position, self.constant(wanted.reshape(now.shape), value))
            return
        for operation, operand in _steps(flat, wanted, scaling=scaling):
            value = self.insert(node, operation, [value, self.constant(operand.reshape(now.shape), value)])
        node.replace_input_with(position, value)

    def insert(
        self,
        before: ir.Node,
        operation: str,
        operands: Sequence[ir.Value | None],
        **attributes: ir.Attr | int,
    ) -> ir.Value:
        """Put an operator in front of a node, and return its result, which stands for its first operand."""
        name = self._new_name()
        made = ir.node(operation, operands, attributes=attributes, name=name)
        (result,) = made.outputs
        result.name = name
        self._graph.insert_before(before, made)
        self._origins[result] = self.name(operands[0])
        self._shapes.infer(made)
        return result

    def scale_operand(self, node: ir.Node, position: int, factor: float) -> None:
        """Multiply an operand of a node, for this node alone."""
        value = node.inputs[position]
        if value is None:
            return
        if ir.convenience.get_const_tensor(value) is None:
            node.replace_input_with(position, self.insert(node, "Mul", [value, self._factor(factor, value)]))
            return
        numbers = numbers_in(value)
        scaled = (numbers.astype(np.float64) * factor).astype(numbers.dtype)
        if len(value.uses()) == 1:
            set_numbers(value, scaled)
        else:
            node.replace_input_with(position, self.constant(scaled, value))

    def scale_result(self, node: ir.Node, factor: float) -> None:
        """Multiply what a node with one result returns: the node becomes the product."""
        source = self.insert(node, node.op_type, node.inputs, **node.attributes)
        node.op_type = "Mul"
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(0, source)
        node.replace_input_with(1, self._factor(factor, source))

    def _chosen(self, node: ir.Node, value: ir.Value, dim: int, axis: Layout) -> ir.Value:
        """Return what stays of one axis of a value: a table of its own, or gathered when the graph runs."""
        if any(atom.anchored for atom in atoms_of(axis)):
            raise self.refused(node, f"axis {dim} of '{value.name}' mixes units with sizes of the inputs")
        kept = self.kept(axis)
        key = value, dim, kept.tobytes()
        if key not in self._selected:
            if ir.convenience.get_const_tensor(value) is not None:
                self._selected[key] = self.constant(np.take(numbers_in(value), kept, axis=dim), value)
            else:
                self._selected[key] = self.insert(node, "Gather", [value, self.constant(kept)], axis=dim)
        return self._selected[key]

    def _factor(self, factor: float, like: ir.Value) -> ir.Value:
        dtype = self._shapes.known[like].dtype
        return self.constant(np.asarray(factor).astype(dtype.numpy()))

    def _new_name(self) -> str:
        """Return a name that nothing has, what an earlier surgery left included."""
        name = next(name for number in self._counter if (name := f"selection_{number}") not in self._names)
        self._names.add(name)
        return name


def _steps(now: Indices, wanted: Indices, *, scaling: bool) -> list[tuple[str, Indices]]:
    """Return the operators, with their operands, that turn sizes into others, neutral ones left out."""
    scales = scaling & (now > 0) & (wanted > 0)
    divisor = np.gcd(np.where(scales, now, 1), np.where(scales, wanted, 1))
    steps = [
        ("Mul", np.where(scales, wanted, 1) // divisor, 1),
        ("Div", np.where(scales, now, 1) // divisor, 1),
        ("Add", np.where(scales, 0, wanted - now), 0),
    ]
    return [(operation, operand) for operation, operand, neutral in steps if (operand != neutral).any()]
