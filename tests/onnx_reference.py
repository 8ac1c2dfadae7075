"""What surgery on ONNX graphs is held to: the graph as it was, its removed units set to zero, run in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from hypothesis import strategies as st
from numpy.typing import NDArray

from graphprune.coupling.groups import NodeGroups
from graphprune.shrink.plan import Plan
from graphprune.trace.graph import OperatorGraph

Arrays = Mapping[str, NDArray[Any]]


def zeroed(groups: NodeGroups, removed: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """Return the graph with zeros wherever members of a removed unit lie."""
    model: ir.Model = groups.graph.program.clone()
    held = {node.outputs[0].name: node for node in model.graph if node.op_type == "Constant"}
    for name, units in removed.items():
        for member in groups[name].members:
            if member.side == "selected":
                continue
            value = model.graph.initializers.get(member.parameter) or held[member.parameter].outputs[0]
            numbers = ir.convenience.get_const_tensor(value).numpy().copy()
            for unit in units:
                np.moveaxis(numbers, member.axis, 0)[groups[name].indices(member, unit)] = 0
            if value.producer() is None:
                value.const_value = ir.tensor(numbers, name=value.name)
            else:
                held[member.parameter].attributes["value"] = ir.AttrTensor("value", ir.tensor(numbers))
    return in_memory(model)


def in_memory(model: ir.Model) -> onnx.ModelProto:
    """Return a model with all its weights, wherever they lie."""
    return ir.to_proto(ir.external_data.load_to_model(model.clone()))


def run(model: onnx.ModelProto, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(list(outputs), dict(inputs))


def example_inputs(graph: OperatorGraph, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return random inputs at small sizes that fit each other."""
    generator = np.random.default_rng(seed)
    sizes = {"batch": 2, "length": 5, "past": 3}
    found = {}
    for value in graph.program.graph.inputs:
        if value.name in graph.program.graph.initializers:
            continue
        shape = [dim if isinstance(dim, int) else sizes.get(dim.value, sizes["batch"] if axis == 0 else 5)
                 for axis, dim in enumerate(value.shape)]  # fmt: skip
        dtype = value.dtype.numpy()
        if np.issubdtype(dtype, np.floating):
            found[value.name] = generator.standard_normal(shape).astype(dtype)
        elif value.name == "at" or "position" in value.name:
            found[value.name] = np.broadcast_to(np.arange(shape[1], dtype=dtype), shape)
        elif "mask" in value.name:
            found[value.name] = np.ones(shape, dtype)
        else:
            found[value.name] = generator.integers(3, 60, shape).astype(dtype)
    return found


def cut_caches(groups: NodeGroups, inputs: Arrays, removed: Mapping[str, Sequence[int]]) -> Arrays:
    """Return inputs of which caches have lost what removed units own of them."""
    kept = {name: np.setdiff1d(np.arange(groups[name].size), units) for name, units in removed.items()}
    selection, cut = groups.selection(kept), dict(inputs)
    for past, _ in groups.graph.states:
        for dim, axis in enumerate(groups.axes(past)):
            if axis.size == inputs[past].shape[dim]:
                cut[past] = np.take(cut[past], groups.keep(axis, selection), axis=dim)
    return cut


def assert_as_zeroed(
    groups: NodeGroups, small: ir.Model, removed: Mapping[str, Sequence[int]], *, tolerance: float = 2e-5
) -> None:
    """Assert that a cut model computes what the whole one does with zeros, at other sizes than those of the trace."""
    inputs = example_inputs(groups.graph)
    outputs = [value.name for value in groups.graph.outputs if value.name not in groups.graph.state_names]
    expected = run(zeroed(groups, removed), inputs, outputs)
    found = run(in_memory(small), cut_caches(groups, inputs, removed), outputs)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-6)


def assert_valid(small: ir.Model) -> None:
    """Assert that a file of standard operators passes the full check, and that its declared shapes are right."""
    proto = in_memory(small)
    whole = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(whole, full_check=True)


@st.composite
def plans(draw: st.DrawFn, groups: NodeGroups) -> Plan:
    """Draw units to remove of every group that may lose some."""
    removed = {}
    for group in groups.prunable():
        most = group.size - group.minimum
        units = st.lists(st.integers(0, group.size - 1), max_size=most, unique=True)
        removed[group.name] = draw(units)
    return Plan(removed)
