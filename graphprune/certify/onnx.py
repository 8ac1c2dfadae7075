"""The checks of node groups for ONNX models, which run the file's own graph in onnxruntime.

Renumbering the units of correct groups leaves the outputs as they are; what operators read through a copy of its
layout (angles, masks) is permuted in front of each reader, and nothing else of the graph has to change. Removing units
is the same as zeroing what the groups' members name: the cut model is compared with the whole one on zeroed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.certify.onnx_routing import forbid_choices
from graphprune.certify.onnx_session import OnnxSession, as_arrays
from graphprune.coupling.algebra import Axes
from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.node_group import NodeGroup
from graphprune.coupling.selection import Indices, Selection
from graphprune.errors import CouplingError, OperatorShrinkError, ShrinkError, VerificationError
from graphprune.shrink.onnx import shrink_onnx
from graphprune.shrink.onnx_weights import cut_weights, numbers_in, set_numbers, zero_weights
from graphprune.trace.onnx import named_nodes


def permutation_error(
    groups: NodeGroups, inputs: Mapping[str, Any], *, only: NodeGroup | None = None, seed: int = 0
) -> float:
    """Return how far the outputs move when the units of all groups are renumbered at random.

    The model runs in float32: rounding alone moves outputs by some 1e-6.

    Args:
        groups: Node groups of an ONNX graph.
        inputs: The model's inputs by name, arrays or torch tensors; caches may be of any length, at the sizes of the
            file otherwise.
        only: One group to renumber; by default all that can be.
        seed: Of the permutations and the random numbers.

    Returns:
        The largest absolute difference of any output, divided by its largest absolute value; caches are left out.

    Raises:
        CouplingError: If no group can be permuted.
        InputsError: If an input is missing, or there is none of that name.
    """
    movable = [only] if only else [group for group in groups.values() if group.permutable]
    return OnnxTrial(groups, inputs, seed=seed).permuted_error(movable)


class OnnxTrial:
    """An ONNX model, its inputs, and its outputs before anything is done to it.

    Weights that are constant would hide mistakes and are replaced by random numbers in all runs.

    Args:
        groups: Node groups of an ONNX graph.
        inputs: The model's inputs by name, arrays or torch tensors.
        seed: Of the permutations, the removed units and the random numbers.
        model: The same graph on other weights; by default the one that the groups were read off.

    Raises:
        InputsError: If an input is missing, or there is none of that name.
        VerificationError: If onnxruntime cannot run the model.
    """

    def __init__(
        self, groups: NodeGroups, inputs: Mapping[str, Any], *, seed: int = 0, model: ir.Model | None = None
    ) -> None:
        self._groups = groups
        self._generator = np.random.default_rng(seed)
        self._model: ir.Model = (groups.graph.program if model is None else model).clone()
        self._inputs = as_arrays(inputs, self._model)
        for name, value in groups.graph.weights.items():
            if value.role == "parameter" and name in self._model.graph.initializers:
                _probe(self._model.graph.initializers[name], self._generator)
        self._outputs = [
            value.name for value in groups.graph.outputs if value.name not in groups.graph.state_names
        ]
        self._reference = OnnxSession(self._model).run(self._inputs, self._outputs)

    def permuted_error(self, groups: Sequence[NodeGroup]) -> float:
        """Renumber the units of `groups` at random; return how far the outputs move.

        Raises:
            CouplingError: If there are no groups.
        """
        if not groups:
            raise CouplingError("no group can be permuted", "see the groups' reasons")
        order = {group.name: self._generator.permutation(group.size) for group in groups}
        model = self._model.clone()
        cut_weights(model, self._groups, order)
        _gather_copies(model, self._groups, self._groups.selection(order))
        return self._distance_of(model, order, self._reference)

    def removed_error(self, groups: Sequence[NodeGroup]) -> tuple[float, float]:
        """Remove random units of `groups`; return the distance from zeroing them, and what zeroing did."""
        kept = {group.name: self._survivors(group) for group in groups}
        zeroed = self._model.clone()
        zero_weights(zeroed, self._groups, kept)
        forbid_choices(zeroed, self._groups, kept)
        expected = OnnxSession(zeroed).run(self._inputs, self._outputs)
        del zeroed
        effect = _distance(self._reference, expected)
        try:
            small = shrink_onnx(self._model, self._groups, kept)
        except ShrinkError:  # operators that should follow the others do not: the groups are wrong
            return float("inf"), effect
        return self._distance_of(small, kept, expected), effect

    def removable(self, groups: Sequence[NodeGroup]) -> list[NodeGroup]:
        """Return those of `groups` that may lose units as far as the operators are concerned.

        Some of onnxruntime's operators take only some sizes, or sizes that belong together; where one does not take
        a group's, groups of that kind and size are left out.
        """
        left = list(groups)
        while left and (operator := self._refusing(left)):
            refused = {(g.kind, g.size) for g in left if self._refusing([g]) == operator}
            left = [g for g in left if refused and (g.kind, g.size) not in refused]
        return left

    def _refusing(self, groups: Sequence[NodeGroup]) -> str:
        """Return the operator that cannot be told that each of `groups` lost a unit; none if all can."""
        try:
            shrink_onnx(self._model, self._groups, {g.name: np.arange(1, g.size) for g in groups})
        except OperatorShrinkError as error:
            return error.operator
        except ShrinkError:  # for `removed_error` to find out
            return ""
        return ""

    def _distance_of(
        self, model: ir.Model, kept: Mapping[str, Indices], expected: list[NDArray[Any]]
    ) -> float:
        """Run a model of which some units are kept, or in another order, and compare."""
        selection = self._groups.selection(kept)
        caches = {past for past, _ in self._groups.graph.states}
        moved = {
            name: _taken(array, self._groups, self._groups.axes(name), selection) if name in caches else array
            for name, array in self._inputs.items()
        }
        try:
            return _distance(OnnxSession(model).run(moved, self._outputs), expected)
        except VerificationError:  # shapes that no longer fit each other: the groups are wrong
            return float("inf")

    def _survivors(self, group: NodeGroup) -> Indices:
        most = min(group.size // 2, group.size - group.minimum)
        gone = self._generator.integers(1, max(1, most) + 1)
        return np.sort(self._generator.permutation(group.size)[gone:])


def _gather_copies(model: ir.Model, groups: NodeGroups, selection: Selection) -> None:
    for operator, node in list(named_nodes(model.graph)):
        copies = groups.read(operator)
        for position, operand in enumerate(node.inputs):
            if operand is not None and operand.name in copies:
                _gather(model.graph, groups, node, position, copies[operand.name], selection)


def _gather(
    graph: ir.Graph, groups: NodeGroups, reader: ir.Node, position: int, axes: Axes, selection: Selection
) -> None:
    """Put a Gather for each axis that is permuted between a value and one of its readers."""
    for dim, axis in enumerate(axes):
        order, value = groups.keep(axis, selection), reader.inputs[position]
        if value is None or np.array_equal(order, np.arange(len(order))):
            continue
        indices = ir.val(
            f"{reader.outputs[0].name}.{position}.{dim}", const_value=ir.tensor(order.astype(np.int64))
        )
        graph.register_initializer(indices)
        gather = ir.node("Gather", [value, indices], attributes={"axis": dim})
        graph.insert_before(reader, gather)
        reader.replace_input_with(position, gather.outputs[0])


def _taken(array: NDArray[Any], groups: NodeGroups, axes: Axes | None, selection: Selection) -> NDArray[Any]:
    for dim, axis in enumerate(axes or ()):
        if axis.size == array.shape[dim]:
            array = np.take(array, groups.keep(axis, selection), axis=dim)
    return array


def _probe(value: ir.Value, generator: np.random.Generator) -> None:
    numbers = numbers_in(value)
    if np.issubdtype(numbers.dtype, np.floating) and bool((numbers == numbers.flat[0]).all()):
        set_numbers(value, numbers + 0.05 * generator.standard_normal(numbers.shape).astype(numbers.dtype))


def _distance(found: list[NDArray[Any]], expected: list[NDArray[Any]]) -> float:
    """Return the largest difference of any output, relative to its largest number."""
    return max(_distance_of_arrays(one, other) for one, other in zip(found, expected, strict=True))


def _distance_of_arrays(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max()) / (float(np.abs(expected).max()) or 1.0)
