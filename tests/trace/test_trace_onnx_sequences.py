"""Splits through sequences: what the rewritten model computes is what the file computes, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_models import GraphBuilder

from graphprune.coupling.groups import node_groups
from graphprune.trace.onnx import trace_onnx
from graphprune.trace.onnx_sequences import without_sequences

INPUT = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
WAYS = {  # how the ten columns are split, and the positions that are read
    "equal pieces": (np.array(4), {}, (2, 0, 1)),
    "given sizes": (np.array([3, 7]), {}, (0, -1, 0)),
    "a size as a list": (np.array([10]), {}, (0,)),
    "single columns": (None, {}, (9, 0)),
    "single columns, squeezed": (None, {"keepdims": 0}, (3, -2)),
    "sizes win over squeezing": (np.array([5, 5]), {"keepdims": 0}, (0, 1)),
}


def split_model(sizes, attributes, positions, opset=18) -> tuple[ir.Model, str]:
    """Project, split the projection, and return pieces; also the name of the sequence."""
    build = GraphBuilder(opset)
    wide = build.node("MatMul", "x", build.weight("w", 5, 10))
    given = [] if sizes is None else [build.constant("sizes", sizes)]
    sequence = build.node("SplitToSequence", wide, *given, axis=-1, **attributes)
    pieces = [
        build.node("SequenceAt", sequence, build.constant(f"at{i}", np.array(position)))
        for i, position in enumerate(positions)
    ]
    model = build.model({"x": ("FLOAT", (2, 5))}, [build.node("Relu", piece) for piece in pieces])
    for node in model.graph:
        if node.op_type == "MatMul":
            node.outputs[0].shape = ir.Shape([2, 10])
    return model, sequence


def outcome(model: ir.Model) -> list[np.ndarray]:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": INPUT})


@pytest.mark.parametrize("way", WAYS)
def test_a_split_computes_what_the_sequence_did(way):
    model, _ = split_model(*WAYS[way])
    changed = without_sequences(model)
    assert not {"SplitToSequence", "SequenceAt"} & {node.op_type for node in changed.graph}
    assert {"SplitToSequence", "SequenceAt"} <= {node.op_type for node in model.graph}
    expected, found = outcome(model), outcome(changed)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    graph = trace_onnx(model)
    assert [value.shape for value in graph.outputs] == [result.shape for result in expected]


def test_pieces_are_units_of_their_own():
    groups = node_groups(trace_onnx(split_model(*WAYS["given sizes"])[0]))
    sizes = {
        tuple(np.flatnonzero(group.owner(group.members[0]) >= 0))
        for group in groups.values()
        if group.members[0].axis
    }
    assert sizes == {(0, 1, 2), tuple(range(3, 10))}


def read_otherwise(model: ir.Model, sequence: ir.Value) -> None:
    model.graph.append(ir.Node("", "SequenceLength", [sequence]))


def return_it(model: ir.Model, sequence: ir.Value) -> None:
    model.graph.outputs.append(sequence)


def forget_the_width(model: ir.Model, sequence: ir.Value) -> None:
    sequence.producer().inputs[0].shape = None


def read_past_the_end(model: ir.Model, sequence: ir.Value) -> None:
    position = ir.node("Constant", [], {"value_int": 3})
    model.graph.insert_before(sequence.uses()[0].node, position)
    sequence.uses()[0].node.replace_input_with(1, position.outputs[0])


def compute_the_position(model: ir.Model, sequence: ir.Value) -> None:
    reader = sequence.uses()[0].node
    position = ir.Node("", "Shape", [model.graph.inputs[0]])
    model.graph.insert_before(reader, position)
    reader.replace_input_with(1, position.outputs[0])


def compute_the_size(model: ir.Model, sequence: ir.Value) -> None:
    split = sequence.producer()
    size = ir.Node("", "Size", [model.graph.inputs[0]])
    model.graph.insert_before(split, size)
    split.replace_input_with(1, size.outputs[0])


@pytest.mark.parametrize(
    "spoil",
    [read_otherwise, return_it, forget_the_width, read_past_the_end, compute_the_position, compute_the_size],
)
def test_what_cannot_be_told_stays_and_is_opaque(spoil):
    model, name = split_model(*WAYS["equal pieces"])
    (sequence,) = [value for node in model.graph for value in node.outputs if value.name == name]
    spoil(model, sequence)
    changed = without_sequences(model)
    assert "SplitToSequence" in {node.op_type for node in changed.graph}
    assert "Split" not in {node.op_type for node in changed.graph}
    groups = node_groups(trace_onnx(model))
    assert not any(group.permutable for group in groups.values())


def test_a_model_without_sequences_is_returned_as_it_is():
    build = GraphBuilder()
    model = build.model({"x": ("FLOAT", (2, 5))}, [build.node("Relu", "x")])
    assert without_sequences(model) is model
