"""The ONNX front end: shapes and numbers against a run of the model, roles, names, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import GraphBuilder, genai_decoder
from tiny_models import tiny_llama

import graphprune
from graphprune.errors import TraceError, TraceWarning
from graphprune.trace.graph import Value
from graphprune.trace.onnx import trace_onnx
from graphprune.trace.onnx_shapes import ShapeInference


@pytest.fixture(scope="module")
def exported_llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    open_size = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.onnx.export(
            tiny_llama(),
            kwargs={"input_ids": torch.ones(2, 11, dtype=torch.long), "use_cache": False},
            dynamo=True,
            opset_version=18,
            dynamic_shapes={"input_ids": {0: open_size, 1: open_size}, "use_cache": None},
            verbose=False,
        )
    program.save(path, external_data=True)
    return path


def run_everything(model: ir.Model, feeds, folder):
    """Run in onnxruntime, weights from `folder`, with every intermediate value as an output; return them by name."""
    proto = ir.to_proto(model)
    known = {output.name for output in proto.graph.output}
    for node in proto.graph.node:
        for name in node.output:
            if name and name not in known:
                proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = folder / "everything.onnx"
    path.write_bytes(proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_agrees_with_run(graph, results):
    checked = 0
    for operator in graph.operators:
        for value in operator.outputs:
            if value is not None:
                assert value.shape == results[value.name].shape, value.name
                checked += 1
        for value in operator.inputs:
            if value.content is not None and value.name in results:
                np.testing.assert_array_equal(value.content, results[value.name])
    return checked


def test_shapes_and_numbers_are_those_of_a_run(exported_llama):
    graph = trace_onnx(exported_llama)
    (ids,) = graph.inputs
    model = ir.load(exported_llama)
    results = run_everything(model, {ids.name: np.ones(ids.shape, np.int64)}, exported_llama.parent)
    assert assert_agrees_with_run(graph, results) > 100


def test_numbers_that_follow_from_sizes_are_worked_out_and_kept_if_they_hold_for_all_sizes(tmp_path):
    build = GraphBuilder()
    shape = build.node("Shape", "x")
    batch = build.node("Gather", shape, build.constant("zero", np.array([0])))
    width = build.node("Gather", shape, build.constant("two", np.array([2])))
    half = build.node("Div", width, "two")
    target = build.node("Concat", batch, build.constant("rest", np.array([-1, 2])), half, axis=0)
    split = build.node("Reshape", "x", target)
    taken = build.node("Slice", split, build.constant("start", [1]), half, build.constant("axis", [3]))
    model = build.model({"x": ("FLOAT", ("batch", "length", 6))}, [taken])
    graph = trace_onnx(model)
    assert [operator.target for operator in graph.operators] == ["onnx.Reshape", "onnx.Slice"]
    reshape, slice_ = graph.operators
    assert slice_["ends"].content.tolist() == [3]
    assert reshape["shape"].content is None  # it holds the batch
    assert reshape["shape"].role == "constant"
    results = run_everything(model, {"x": np.zeros(graph.inputs[0].shape, np.float32)}, tmp_path)
    assert assert_agrees_with_run(graph, results) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_of_fused_operators_are_those_of_a_run(packed, tmp_path):
    model = genai_decoder(packed=packed)
    graph = trace_onnx(model, {"batch": 1, "length": 5, "past": 4, "total": 9})
    feeds = {
        value.name: np.ones(value.shape, np.int64 if value.dtype == "int64" else np.float32)
        for value in graph.inputs
    }
    feeds = {name: (feed[:, :, :0] if feed.ndim == 4 else feed) for name, feed in feeds.items()}
    feeds["mask"] = np.ones((1, 5), np.int64)
    results = run_everything(model, feeds, tmp_path)
    without_cache = [
        (value.shape, results[value.name].shape)
        for operator in graph.operators
        for value in operator.outputs
        if value is not None and value.name in results
    ]
    # the run has an empty cache of length 0, the trace one of length 4
    for traced, run in without_cache:
        assert tuple(size - 4 if size == 9 else size for size in traced) == run


def test_parameters_stand_under_the_names_of_the_file(exported_llama):
    graph = trace_onnx(exported_llama)
    model = ir.load(exported_llama)
    floats = {
        name: tuple(value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT and value.const_value.size > 1
    }
    assert {name: value.shape for name, value in graph.weights.items()} == floats
    roles = {value.role for value in graph.weights.values()}
    assert roles == {"parameter", "buffer"}
    assert [name for name, value in graph.weights.items() if value.role == "buffer"] != []
    assert graph.operators[-1].module == "lm_head"


def test_weights_stay_on_disk(exported_llama):
    data = exported_llama.with_name("model.onnx.data")
    whole = trace_onnx(exported_llama)
    content = data.read_bytes()
    data.unlink()
    try:
        assert trace_onnx(exported_llama).weights == whole.weights
    finally:
        data.write_bytes(content)


def mlp(build: GraphBuilder, source: str = "x") -> str:
    wide = build.node("Relu", build.node("MatMul", source, build.weight("up", 6, 10)))
    return build.node("MatMul", wide, build.weight("down", 10, 6))


X = {"x": ("FLOAT", ("batch", 6))}


def test_arguments_carry_schema_names_and_defaults():
    build = GraphBuilder()
    y = build.node("Gemm", "x", build.weight("w", 10, 6), build.weight("b", 10), transB=1)
    graph = trace_onnx(build.model(X, [build.node("Softmax", y)]))
    gemm, softmax = graph.operators
    assert (gemm.target, softmax.target) == ("onnx.Gemm", "onnx.Softmax")
    assert [gemm[name].name for name in "ABC"] == ["x", "w", "b"]
    assert (gemm["transA"], gemm["transB"], softmax["axis"]) == (0, 1, -1)


def test_sizes_may_be_chosen_and_collide_with_nothing_otherwise():
    build = GraphBuilder()
    model = build.model({"x": ("FLOAT", ("batch", None, 6))}, [mlp(build)])
    assert trace_onnx(model, {"batch": 4, "x:1": 9}).inputs[0].shape == (4, 9, 6)
    batch, length, width = trace_onnx(model).inputs[0].shape
    assert width == 6
    assert len({batch, length, 6, 10}) == 4


def test_an_unknown_symbol_is_an_error_that_names_those_there_are():
    build = GraphBuilder()
    model = build.model(X, [mlp(build)])
    with pytest.raises(TraceError, match="sequence") as caught:
        trace_onnx(model, {"sequence": 5})
    assert "batch" in caught.value.remedy
    with pytest.raises(TraceError, match="size of 'batch'"):
        trace_onnx(model, {"batch": 0})


def test_symbols_that_must_fit_each_other_are_made_to_fit():
    build = GraphBuilder()
    keys = [build.node("Concat", f"past.{i}", "new", axis=1) for i in range(3)]
    masked = [build.node("Add", key, build.node("Unsqueeze", "mask", build.constant(f"axis{i}", [2])))
              for i, key in enumerate(keys)]  # fmt: skip
    pasts = {f"past.{i}": ("FLOAT", ("batch", f"p{i}", 6)) for i in range(3)}
    inputs = {**pasts, "new": ("FLOAT", ("batch", "s", 6)), "mask": ("FLOAT", ("batch", "t"))}
    graph = trace_onnx(build.model(inputs, [*masked, *keys]))
    sizes = {value.name: value.shape[1] for value in graph.inputs}
    assert sizes["mask"] == sizes["past.0"] + sizes["new"]
    assert sizes["past.0"] == sizes["past.1"] == sizes["past.2"]
    assert all("unknown" not in operator.target for operator in graph.operators)


def test_caches_of_many_layers_are_made_to_fit_at_once(monkeypatch):
    runs = []
    run = ShapeInference.run
    monkeypatch.setattr(ShapeInference, "run", lambda shapes: (runs.append(shapes), run(shapes)))
    build = GraphBuilder()
    keys = [build.node("Concat", f"past.{i}", "new", axis=1) for i in range(12)]
    inputs = {f"past.{i}": ("FLOAT", ("batch", f"p{i}", 6)) for i in range(12)}
    inputs["new"] = ("FLOAT", ("batch", "s", 6))
    graph = trace_onnx(build.model(inputs, [build.node("Sum", *keys)]))
    assert len({value.shape for value in graph.inputs}) == 2
    assert len(runs) == 4  # at two assignments of sizes, each mended once


def test_an_initializer_read_twice_is_one_value_and_one_that_can_be_overridden_a_parameter():
    build = GraphBuilder()
    w = build.weight("w", 6, 6)
    model = build.model(
        {**X, "w": ("FLOAT", (6, 6))}, [build.node("MatMul", build.node("MatMul", "x", w), w)]
    )
    graph = trace_onnx(model)
    assert [value.name for value in graph.inputs] == ["x"]
    assert [operator["B"] for operator in graph.operators] == [graph.weights["w"]] * 2
    assert graph.weights["w"].role == "parameter"


def test_numbers_in_constant_nodes_are_treated_as_initializers():
    build = GraphBuilder()
    weight = build.node("Constant", value=onnx.numpy_helper.from_array(np.ones((6, 4), np.float32)))
    shape = build.node("Constant", value_ints=[-1, 2, 2])
    model = build.model(X, [build.node("Reshape", build.node("MatMul", "x", weight), shape)])
    graph = trace_onnx(model)
    assert graph.weights[weight].role == "parameter"
    assert graph.operators[-1]["shape"].content.tolist() == [-1, 2, 2]
    assert graph.outputs[0].shape[1:] == (2, 2)


def test_what_is_not_learned_is_a_buffer():
    build = GraphBuilder()
    channels = [build.weight(name, 6) for name in ("scale", "shift", "mean", "variance")]
    normed = build.node("BatchNormalization", "x", *channels)
    phase = build.node("Mul", "x", build.weight("frequencies", 6))
    model = build.model(X, [build.node("Mul", normed, build.node("Cos", phase))])
    roles = {name: value.role for name, value in trace_onnx(model).weights.items()}
    assert roles == {
        "scale": "parameter",
        "shift": "parameter",
        "mean": "buffer",
        "variance": "buffer",
        "frequencies": "buffer",
    }


def test_constant_operands_that_a_node_refuses_are_warned_of():
    build = GraphBuilder()
    width = build.node("Gather", build.constant("widths", [2, 3]), build.constant("index", [5]))
    shape = build.node("Concat", build.constant("rows", [-1]), width, axis=0)
    model = build.model(X, [build.node("Reshape", "x", shape)])
    with pytest.warns(TraceWarning, match=r"'Gather_0' \(Gather\).*out of bounds") as caught:
        graph = trace_onnx(model)
    assert len({str(warning.message) for warning in caught}) == 1
    assert graph.operators[0].outputs[0].content is None


def test_functions_are_inlined_in_a_copy():
    body = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("Relu", ["c"], ["d"])]
    function = helper.make_function("local", "Layer", ["a", "b"], ["d"], body, [helper.make_opsetid("", 21)])
    build = GraphBuilder()
    y = build.node("Layer", "x", build.weight("w", 6, 4), domain="local")
    model = build.model(X, [y], [function])
    graph = trace_onnx(model)
    assert [operator.target for operator in graph.operators] == ["onnx.MatMul", "onnx.Relu"]
    assert [node.op_type for node in model.graph] == ["Layer"]
    assert len(model.functions) == 1


def test_the_model_is_not_changed(exported_llama):
    model = ir.load(exported_llama)
    before = ir.to_proto(model).SerializeToString()
    assert trace_onnx(model).program is model
    assert ir.to_proto(model).SerializeToString() == before


def test_an_operator_with_subgraphs_reads_what_they_capture():
    build = GraphBuilder()
    y = build.node("MatMul", "x", build.weight("w", 6, 4))
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, [y], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])],
        )
        for name, op in (("then_branch", "Relu"), ("else_branch", "Neg"))
    }
    result = build.node("If", "flag", **branches)
    model = build.model({**X, "flag": ("BOOL", ())}, [build.node("Relu", result)])
    graph = trace_onnx(model)
    conditional = next(operator for operator in graph.operators if operator.target.startswith("onnx.If"))
    assert y in [value.name for value in conditional.inputs]
    assert len(graph.operators) == 3


def test_a_cache_is_a_state_and_a_model_output_like_it_is_not():
    build = GraphBuilder()
    key = build.node("Concat", "past", "x", axis=1)
    scores = build.node("MatMul", "x", build.node("Transpose", key, perm=[0, 2, 1]))
    prefixed = build.node("Concat", "prefix", "x", axis=1)
    closed = build.node("Concat", "four", "x", axis=1)
    read = build.node("Neg", closed)
    inputs = {name: ("FLOAT", ("batch", name, 6)) for name in ("past", "x", "prefix")}
    inputs["four"] = ("FLOAT", ("batch", 4, 6))
    graph = trace_onnx(build.model(inputs, [scores, key, prefixed, closed, read]))
    assert graph.states == (("past", key),)


def test_a_cache_whose_length_is_read_elsewhere_is_a_state():
    build = GraphBuilder()
    key = build.node("Concat", "past", "x", axis=1)
    length = build.node("Gather", build.node("Shape", "past"), build.constant("one", np.array([1])))
    scores = build.node("MatMul", "x", build.node("Transpose", key, perm=[0, 2, 1]))
    inputs = {name: ("FLOAT", ("batch", name, 6)) for name in ("past", "x")}
    assert trace_onnx(build.model(inputs, [scores, key, length])).states == (("past", key),)


def test_genai_caches_are_states():
    graph = trace_onnx(genai_decoder())
    assert [past for past, _ in graph.states] == [
        f"past.{i}.{part}" for i in (0, 1) for part in ("key", "value")
    ]


def test_networkx_view_holds_every_operator():
    graph = trace_onnx(genai_decoder(bits=4))
    operators = [node for node, data in graph.nx.nodes(data=True) if data["kind"] == "operator"]
    assert len(operators) == len(graph.operators)
    assert all(isinstance(value, Value) for value in graph.weights.values())


def test_the_public_interface_takes_files_and_models_in_memory(tmp_path):
    build = GraphBuilder()
    model = build.model(X, [mlp(build)])
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    for given in (model, path, str(path)):
        groups = graphprune.node_groups(graphprune.trace(given))
        assert [group.size for group in groups.values() if group.prunable] == [10]
    assert graphprune.trace(path, {"batch": 3}).inputs[0].shape == (3, 6)


def test_files_that_are_none(tmp_path):
    with pytest.raises(TraceError, match="no file"):
        trace_onnx(tmp_path / "absent.onnx")
    for content in (b"not a model", b""):
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        with pytest.raises(TraceError, match="not an ONNX model"):
            trace_onnx(path)
