"""ONNX files with packed weights: what they compute is what the float file computes on the quantizer's weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_exports import EXPORTS, exported
from onnx_models import GraphBuilder
from onnx_reference import Arrays, example_inputs, in_memory, run

import graphprune as gp
from graphprune.errors import ExportError, QuantizationError
from graphprune.export.file_weights import file_weights
from graphprune.trace.onnx import trace_onnx
from quant import format_names, quantize

BLOCK = 16


def on_quantized_weights(model: ir.Model, quantized, format: str, table_format: str) -> onnx.ModelProto:
    """The float file, its matrices replaced by what `quant` makes of them; (in, out) ones are turned for it."""
    proto = in_memory(model)
    tables = {name for node in proto.graph.node if node.op_type == "Gather" for name in node.input[:1]}
    for initializer in proto.graph.initializer:
        if initializer.name in quantized.packed:
            weight = torch.from_numpy(numpy_helper.to_array(initializer).copy())
            turned = quantized.packed[initializer.name].is_turned
            chosen = table_format if initializer.name in tables else format
            packed = quantize((weight.T if turned else weight).contiguous(), chosen, BLOCK)
            dense = packed.dequantize().numpy()
            initializer.CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(dense.T if turned else dense), initializer.name)
            )
    return proto


def computed(model: ir.Model, inputs: Arrays, outputs):
    """What a file computes on float32 activations; its own products round them to int8."""
    exact = model.clone()
    for node in exact.graph:
        node.attributes.pop("accuracy_level", None)
    return run(in_memory(exact), inputs, outputs)


def assert_computes_on_quantized_weights(
    model, inputs, outputs, format="nf4", table_format="int8", **options
):
    quantized = gp.quantize_onnx(
        model,
        format=format,
        embedding_format=table_format,
        block_size=BLOCK,
        embedding_block_size=BLOCK,
        exact=True,
        **options,
    )
    expected = run(on_quantized_weights(model, quantized, format, table_format), inputs, outputs)
    for one, other in zip(computed(quantized.model, inputs, outputs), expected, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 2e-5 * max(np.abs(other).max(), 1e-6)
    return quantized


@pytest.fixture(scope="module", params=EXPORTS)
def export(request) -> ir.Model:
    build, opset, inputs = EXPORTS[request.param]
    return exported(build(), inputs, opset)


@pytest.mark.parametrize("profile", ["cpu", "cuda", "portable"])
def test_exports_of_torch_compute_on_the_quantizers_weights(export, profile):
    graph = trace_onnx(export)
    outputs = [value.name for value in graph.outputs]
    before = ir.to_proto(export).SerializeToString()
    for format in ("nf4", "uint3"):
        quantized = assert_computes_on_quantized_weights(
            export, example_inputs(graph), outputs, format, profile=profile
        )
        onnx.checker.check_model(in_memory(quantized.model), full_check=True)
        domains = {node.domain for node in quantized.model.graph}
        assert profile != "portable" or domains <= {"", "ai.onnx"}
    assert ir.to_proto(export).SerializeToString() == before


def test_all_matrices_of_an_export_are_packed(export):
    """Every float matrix but convolutions' kernels; nothing of it is left in the file."""
    quantized = gp.quantize_onnx(export, block_size=BLOCK)
    matrices = {
        name for name, value in export.graph.initializers.items()
        if len(value.shape) == 2 and value.dtype == ir.DataType.FLOAT and min(value.shape) > 1
    }  # fmt: skip
    assert quantized.packed.keys() == matrices
    assert not matrices & quantized.model.graph.initializers.keys()
    assert set(quantized.left.values()) <= {"it has 4 axes"}


@pytest.mark.parametrize("format", format_names())
def test_a_files_weights_are_the_quantizers_by_the_operators_definitions(tmp_path, format):
    build = GraphBuilder(23)
    wide = build.node("MatMul", "x", build.weight("up", 32, 48))
    model = build.model(
        {"x": ("FLOAT", ("batch", 32))}, [build.node("Gemm", wide, build.weight("down", 16, 48), transB=1)]
    )
    quantized = gp.quantize_onnx(model, format=format, block_size=BLOCK, exact=True)
    ir.save(quantized.model, tmp_path / "model.onnx")
    dense = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    expected = {"up": dense["up"].T, "down": dense["down"]}
    for name, found in file_weights(tmp_path / "model.onnx"):
        weight = quantize(torch.from_numpy(expected[quantized.sources[name]].copy()), format, BLOCK)
        np.testing.assert_allclose(found, weight.dequantize().numpy(), atol=5e-7)
    assert {name: weight.quantized.shape for name, weight in quantized.packed.items()} == {
        "up": (48, 32),
        "down": (16, 48),
    }


@st.composite
def chains(draw) -> tuple[ir.Model, Arrays, str]:
    """Products of all forms, of any widths, behind a table that may be the last product's weight too."""
    build = GraphBuilder(draw(st.sampled_from([18, 23])))
    rows, width = draw(st.integers(3, 40)), draw(st.integers(2, 40))
    first = width
    hidden = build.node("Gather", build.weight("table", rows, width), "ids")
    for number in range(draw(st.integers(0, 3))):
        name, out = f"layer{number}.weight", draw(st.integers(2, 40))
        form = draw(st.sampled_from(["MatMul", "turned", "Gemm", "Gemm transB"]))
        if form.startswith("Gemm"):
            flat = build.node("Reshape", hidden, build.constant(f"flat{number}", np.array([-1, width])))
            turns = form == "Gemm transB"
            weight = build.weight(name, *((out, width) if turns else (width, out)))
            flat = build.node("Gemm", flat, weight, build.weight(f"bias{number}", out), transB=int(turns))
            hidden = build.node("Reshape", flat, build.constant(f"back{number}", np.array([2, -1, out])))
        elif form == "turned":
            hidden = build.node("MatMul", hidden, build.node("Transpose", build.weight(name, out, width)))
        else:
            hidden = build.node("MatMul", hidden, build.weight(name, width, out))
        width = out
    if width == first and draw(st.booleans()):
        hidden = build.node("MatMul", hidden, build.node("Transpose", "table", perm=[1, 0]))
    model = build.model({"ids": ("INT64", (2, "length"))}, [hidden])
    ids = np.random.default_rng(draw(st.integers(0, 99))).integers(0, rows, (2, 5))
    return model, {"ids": ids}, hidden


@settings(max_examples=40)
@given(
    chain=chains(),
    format=st.sampled_from(["nf4", "nf2", "uint3", "int4", "uint8"]),
    table=st.sampled_from(["int8", "nf4", "uint3"]),
)
def test_products_of_any_form_compute_on_the_quantizers_weights(chain, format, table):
    model, inputs, output = chain
    quantized = assert_computes_on_quantized_weights(model, inputs, [output], format, table)
    assert not quantized.left
    assert quantized.packed["table"].quantized.format == table


def test_a_tied_head_shares_the_tables_bytes():
    build = GraphBuilder(23)
    hidden = build.node("Gather", build.weight("table", 64, 32), "ids")
    hidden = build.node("MatMul", hidden, build.weight("layer", 32, 32))
    model = build.model(
        {"ids": ("INT64", (2, "length"))},
        [build.node("MatMul", hidden, build.node("Transpose", "table", perm=[1, 0]))],
    )
    quantized = assert_computes_on_quantized_weights(
        model, {"ids": np.arange(10).reshape(2, 5)}, ["MatMul_3_out0"]
    )
    sizes = {name: value.const_value.nbytes for name, value in quantized.model.graph.initializers.items()}
    assert sizes["table.codes"] == 64 * 32
    assert sizes["layer.codes"] == 32 * 32 // 2
    assert sorted(quantized.sources.values()) == ["layer", "table", "table"]
    assert sum(sizes.values()) < 64 * 32 * 2


def unpackable() -> dict[str, tuple[ir.Model, str]]:
    """A matrix `w` that cannot be packed, with words of the reason."""
    found: dict[str, tuple[ir.Model, str]] = {}

    def add(title: str, words: str, build: GraphBuilder, output: str, *more: str, shape=(16, 16)) -> None:
        found[title] = build.model({"x": ("FLOAT", shape)}, [output, *more]), words

    build = GraphBuilder(18)
    add("left", "reads it", build, build.node("MatMul", build.weight("w", 16, 16), "x"))
    build = GraphBuilder(18)
    add("scaled", "scales the product", build, build.node("Gemm", "x", build.weight("w", 16, 16), alpha=0.5))
    build = GraphBuilder(18)
    add("turned operand", "turns what", build, build.node("Gemm", "x", build.weight("w", 16, 16), transA=1))
    build = GraphBuilder(18)
    twice = build.node("MatMul", "x", build.weight("w", 16, 16))
    add("both ways", "others its columns", build, build.node("MatMul", twice, build.node("Transpose", "w")))
    build = GraphBuilder(18)
    added = build.node("Add", "x", build.weight("w", 16, 16))
    add("also added", "Add 'Add_0' reads it", build, build.node("MatMul", added, "w"))
    build = GraphBuilder(18)
    add("vector", "no matrix", build, build.node("MatMul", "x", build.weight("w", 16, 16)), shape=(16,))
    build = GraphBuilder(18)
    kernel = build.weight("w", 4, 2, 3, 3)
    add("kernel", "4 axes", build, build.node("Conv", "x", kernel), shape=(1, 2, 9, 9))
    build = GraphBuilder(18)
    add("returned", "returns it", build, build.node("MatMul", "x", build.weight("w", 16, 16)), "w")
    build = GraphBuilder(18)
    half = build.constant("w", np.ones((16, 16), np.float16) * np.arange(16, dtype=np.float16))
    x = build.node("Cast", "x", to=TensorProto.FLOAT16)
    add("half", "FLOAT16", build, build.node("Cast", build.node("MatMul", x, half), to=TensorProto.FLOAT))
    return found


@pytest.mark.parametrize("title", unpackable())
def test_what_cannot_be_packed_stays_as_it_is_and_says_why(title):
    model, words = unpackable()[title]
    quantized = gp.quantize_onnx(model)
    assert words in quantized.left["w"]
    assert not quantized.packed
    assert ir.to_proto(quantized.model).graph.node == ir.to_proto(model).graph.node
    kept = quantized.model.graph.initializers["w"].const_value.numpy()
    assert np.array_equal(kept, model.graph.initializers["w"].const_value.numpy())


def test_a_subgraph_that_reads_a_matrix_keeps_it():
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="inner")],
        "inner",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    outer = helper.make_node("If", ["flag"], ["z"], name="choice", then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [outer],
        "outer",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(16, dtype=np.float32) + 1, "w")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    assert gp.quantize_onnx(model).left == {"w": "a subgraph reads it"}


def test_numbers_that_a_session_may_be_given_anew_stay():
    build = GraphBuilder(18)
    model = build.model({"x": ("FLOAT", (2, 16))}, [build.node("MatMul", "x", build.weight("w", 16, 16))])
    model.graph.inputs.append(model.graph.initializers["w"])
    assert "other numbers" in gp.quantize_onnx(model).left["w"]


def test_what_is_excluded_stays_and_a_table_takes_its_own_format():
    build = GraphBuilder(18)
    hidden = build.node("Gather", build.weight("embed.table", 32, 16), "ids")
    model = build.model(
        {"ids": ("INT64", (2, 5))}, [build.node("MatMul", hidden, build.weight("head", 16, 32))]
    )
    quantized = gp.quantize_onnx(model, format="int4", exclude="^head$")
    assert quantized.left == {"head": "it was excluded"}
    assert [weight.quantized.format for weight in quantized.packed.values()] == ["int8"]
    quantized = gp.quantize_onnx(model, format="int4", embedding_format=None)
    assert quantized.left == {"embed.table": "tables have no format"}
    assert [weight.quantized.format for weight in quantized.packed.values()] == ["int4"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "nf5"}, QuantizationError, "no format 'nf5'"),
        ({"block_size": 7}, QuantizationError, "block of 7"),
        ({"exclude": "("}, QuantizationError, "not a regular expression"),
        ({"profile": "tpu"}, ExportError, "no export profile 'tpu'"),
    ],
)
def test_settings_that_do_not_exist_are_refused(options, error, message):
    build = GraphBuilder(18)
    model = build.model({"x": ("FLOAT", (2, 16))}, [build.node("MatMul", "x", build.weight("w", 16, 16))])
    with pytest.raises(error, match=message):
        gp.quantize_onnx(model, **options)


def test_old_operators_and_numbers_that_are_none_are_refused():
    build = GraphBuilder(17)
    model = build.model({"x": ("FLOAT", (2, 16))}, [build.node("MatMul", "x", build.weight("w", 16, 16))])
    with pytest.raises(ExportError, match=r"opset 17, and packed weights take 18[^→]*\n.*version_converter"):
        gp.quantize_onnx(model)
    build = GraphBuilder(18)
    broken = build.constant("w", np.full((16, 16), np.nan, np.float32))
    model = build.model({"x": ("FLOAT", (2, 16))}, [build.node("MatMul", "x", broken)])
    with pytest.raises(QuantizationError, match="w"):
        gp.quantize_onnx(model)
