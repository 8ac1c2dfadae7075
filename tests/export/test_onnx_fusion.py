"""Fused operators compute what the operators in their place computed, and what does not fit stays as it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes import common

from graphprune.export.attention import fuse_attention
from graphprune.export.graph_writer import MICROSOFT
from graphprune.export.skip_norm import fuse_skip_norms

HEADER = '<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>'
RESULT, CACHE = "float[b, s, 32] result", "float[b, 2, t, 8] all_keys, float[b, 2, t, 8] all_values"


def attention(**lines: str) -> ir.Model:
    """Return a layer of 4 query heads of size 8 with 2 heads of keys and values, as the tracer leaves it."""
    parts = {
        "keys": "all_keys = Concat <axis = -2> (past_keys, turned_keys)",
        "attend": "y = Attention <scale = 0.3> (turned_query, all_keys, all_values, mask)",
        "join": "joined = Reshape (heads_last, shape_32)",
        "outputs": f"{RESULT}, {CACHE}",
        "more": "",
        **lines,
    }
    return inferred(f"""{HEADER}
    layer (float[b, s, 32] query, float[b, s, 16] keys, float[b, s, 16] values, float[b, s, 4] cosine,
        float[b, s, 4] sine, float[b, 2, p, 8] past_keys, float[b, 2, p, 8] past_values, float[b, 1, s, t] mask)
        => ({parts["outputs"]})
    <int64[4] shape_4 = {{0, 0, 4, 8}}, int64[4] shape_2 = {{0, 0, 2, 8}}, int64[3] shape_32 = {{0, 0, 32}}>
    {{
        split_query = Reshape (query, shape_4)
        early_query = Transpose <perm = [0, 2, 1, 3]> (split_query)
        turned_query = RotaryEmbedding (early_query, cosine, sine)
        split_keys = Reshape (keys, shape_2)
        early_keys = Transpose <perm = [0, 2, 1, 3]> (split_keys)
        turned_keys = RotaryEmbedding (early_keys, cosine, sine)
        split_values = Reshape (values, shape_2)
        new_values = Transpose <perm = [0, 2, 1, 3]> (split_values)
        {parts["keys"]}
        all_values = Concat <axis = 2> (past_values, new_values)
        {parts["attend"]}
        heads_last = Transpose <perm = [0, 2, 1, 3]> (y)
        {parts["join"]}
        result = Tanh (joined)
        {parts["more"]}
    }}""")


def initializer(name: str, numbers: np.ndarray) -> ir.Value:
    tensor = ir.tensor(numbers.astype(np.float32))
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def inferred(text: str) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True))


def results(model: ir.Model) -> list[np.ndarray]:
    """Compute a layer's outputs on seeded inputs: 2 texts, 3 new tokens behind 5."""
    generator = np.random.default_rng(0)
    sizes = {"b": 2, "s": 3, "p": 5, "t": 8}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {
        value.name: generator.standard_normal([sizes.get(axis, axis) for axis in value.shape], np.float32)
        for value in session.get_inputs()
    }
    return session.run(None, feeds)


def operators(model: ir.Model) -> Counter[str]:
    common.RemoveUnusedNodesPass()(model)
    return Counter(node.op_type for node in model.graph)


def fused(model: ir.Model) -> Counter[str]:
    """Fuse attention, hold the results against those before, and return what operators are left."""
    before = results(model)
    names = [value.name for value in model.graph.outputs]
    fuse_attention(model.graph)
    left = operators(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [value.name for value in model.graph.outputs] == names
    for old, new in zip(before, results(model), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-6)
    return left


def test_heads_and_cache_are_the_operators_own_business() -> None:
    assert fused(attention()) == {"Attention": 1, "RotaryEmbedding": 2, "Tanh": 1}


def test_a_norm_of_each_head_costs_a_reshape() -> None:
    """As models have it that norm queries before they are rotated."""
    model = attention()
    graph = model.graph
    split = next(node.outputs[0] for node in graph if node.outputs[0].name == "split_query")
    gain = initializer("gain", np.full(8, 0.7))
    graph.register_initializer(gain)
    norm = ir.node("RMSNormalization", [split, gain], {"axis": -1})
    norm.outputs[0].name, norm.outputs[0].shape, norm.outputs[0].type = "normed", split.shape, split.type
    graph.insert_after(next(node for node in graph if node.outputs[0] is split), norm)
    next(node for node in graph if node.op_type == "Transpose").replace_input_with(0, norm.outputs[0])
    assert fused(model) == {
        "Attention": 1,
        "RotaryEmbedding": 2,
        "RMSNormalization": 1,
        "Reshape": 2,
        "Tanh": 1,
    }


@pytest.mark.parametrize(
    "lines",
    [
        {"keys": "all_keys = Concat <axis = 2> (turned_keys, past_keys)"},
        {"attend": "y = Attention <scale = 0.3, is_causal = 1> (turned_query, all_keys, all_values, mask)"},
        {
            "outputs": f"{RESULT}, {CACHE}, float[b, 2, t, 8] twice",
            "more": "twice = Add (all_keys, all_keys)",
        },
        {"outputs": f"{RESULT}, float[b, 2, t, 8] all_keys"},
    ],
    ids=[
        "the past comes last",
        "causal from the first key",
        "keys are read elsewhere",
        "values are not given out",
    ],
)
def test_what_is_no_plain_cache_stays(lines: dict[str, str]) -> None:
    assert fused(attention(**lines))["Concat"] == 2


def test_a_result_that_is_read_with_its_heads_apart_keeps_them_apart() -> None:
    lines = {
        "join": "joined = Reshape (heads_last, shape_32)\n apart = Tanh (heads_last)",
        "outputs": f"{RESULT}, float[b, s, 4, 8] apart, {CACHE}",
    }
    assert fused(attention(**lines)) == {
        "Attention": 1, "RotaryEmbedding": 2, "Tanh": 2, "Transpose": 4, "Reshape": 4,
    }  # fmt: skip


def test_a_result_that_the_model_gives_out_keeps_its_name() -> None:
    left = fused(attention(outputs=f"float[b, s, 32] joined, {CACHE}"))
    assert left["Attention"] == 1
    assert left["Concat"] == 0


def skip_norm(skip: str, gain: int) -> ir.Model:
    return inferred(f"""{HEADER}
    layer (float[b, s, 16] x, {skip} skip, float[{gain}] gain) => (float[b, s, 16] sum, float[b, s, 16] normed)
    {{
        sum = Add (x, skip)
        normed = RMSNormalization <axis = -1, epsilon = 0.001> (sum, gain)
    }}""")


@pytest.mark.parametrize(
    ("skip", "gain", "fits"),
    [("float[b, s, 16]", 16, True), ("float[s, 16]", 16, False), ("float[b, s, 16]", 1, False)],
)
def test_a_sum_and_its_norm_are_one_operator_unless_something_is_broadcast(
    skip: str, gain: int, fits: bool
) -> None:
    model = skip_norm(skip, gain)
    before = results(model)
    fuse_skip_norms(model.graph)
    assert [node.domain for node in model.graph] == ([MICROSOFT] if fits else ["", ""])
    for old, new in zip(before, results(model), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-6)
