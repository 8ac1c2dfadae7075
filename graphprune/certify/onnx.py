"""The permutation check for ONNX models: renumbering the units of correct groups leaves the outputs as they are.

It runs the file's own graph in onnxruntime, with permuted initializers; what operators read through a copy of its
layout (angles, masks) is permuted in front of each reader. Nothing else of the graph has to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from graphprune.coupling.algebra import Axes
from graphprune.coupling.groups import NodeGroup, NodeGroups
from graphprune.coupling.selection import Indices, Selection
from graphprune.errors import CouplingError, InputsError
from graphprune.trace.onnx import named_nodes

Arrays = Mapping[str, NDArray[Any]]


def permutation_error(
    groups: NodeGroups, inputs: Mapping[str, Any], *, only: NodeGroup | None = None, seed: int = 0
) -> float:
    """Return how far the outputs move when the units of all groups are renumbered at random.

    The model runs in float32: rounding alone moves outputs by some 1e-6. Weights that are constant would hide
    mistakes and are replaced by random numbers in both runs.

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
    generator = np.random.default_rng(seed)
    movable = [only] if only else [group for group in groups.values() if group.permutable]
    if not movable:
        raise CouplingError("no group can be permuted", "see the groups' reasons")
    model: ir.Model = groups.graph.program.clone()
    inputs = _as_arrays(inputs, model)
    for name, value in groups.graph.weights.items():
        if value.role == "parameter" and name in model.graph.initializers:
            _probe(model.graph.initializers[name], generator)
    outputs = [value.name for value in groups.graph.outputs if value.name not in groups.graph.state_names]
    expected = _run(model, inputs, outputs)
    selection = groups.selection({group.name: generator.permutation(group.size) for group in movable})
    _permute(model, groups, selection)
    caches = {past for past, _ in groups.graph.states}
    moved = {
        name: _taken(array, groups, groups.axes(name) if name in caches else None, selection)
        for name, array in inputs.items()
    }
    found = _run(model, moved, outputs)
    return max(_distance(one, other) for one, other in zip(found, expected, strict=True))


def _as_arrays(inputs: Mapping[str, Any], model: ir.Model) -> Arrays:
    wanted = [value.name for value in model.graph.inputs if value.name not in model.graph.initializers]
    missing, unknown = [name for name in wanted if name not in inputs], inputs.keys() - set(wanted)
    if missing or unknown:
        raise InputsError(
            f"the file's inputs are {', '.join(map(str, wanted))}; "
            + (f"not given: {', '.join(map(str, missing))}" if missing else f"none is '{min(unknown)}'"),
            "give each by its name: certify(None, groups, {'input_ids': array})",
        )
    return {
        name: np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        for name, value in inputs.items()
    }


def _permute(model: ir.Model, groups: NodeGroups, selection: Selection) -> None:
    for name in groups.graph.weights:
        if name in model.graph.initializers:
            value = model.graph.initializers[name]
            numbers = value.const_value.numpy() if value.const_value is not None else np.empty(0)
            value.const_value = ir.tensor(_taken(numbers, groups, groups.axes(name), selection), name=name)
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
        order: Indices = groups.keep(axis, selection)
        if len(order) == array.shape[dim] and not np.array_equal(order, np.arange(len(order))):
            array = np.take(array, order, axis=dim)
    return array


def _probe(value: ir.Value, generator: np.random.Generator) -> None:
    numbers = value.const_value.numpy() if value.const_value is not None else np.empty(0)
    if np.issubdtype(numbers.dtype, np.floating) and bool((numbers == numbers.flat[0]).all()):
        noise = 0.05 * generator.standard_normal(numbers.shape)
        value.const_value = ir.tensor((numbers + noise).astype(numbers.dtype), name=value.name)


def _run(model: ir.Model, inputs: Arrays, outputs: list[str]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(outputs, dict(inputs))]


def _distance(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max()) / (float(np.abs(expected).max()) or 1.0)
