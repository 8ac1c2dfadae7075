"""Products of one value become one, to the bit, and each weight is still found under its own name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exported_models import randomize, tiny_uneven_qwen2, windows
from hypothesis import given
from hypothesis import strategies as st
from test_onnx_export import load
from test_onnx_layouts import build, levels_of, quick, random_weight, reference, run

import quant
from graphprune.export.file_weights import file_weights
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.joined_products import join_products
from graphprune.export.layouts import LAYOUTS, choose_layout, rounded_levels
from graphprune.export.packed_matrix import PackedMatrix
from graphprune.export.verify import verify_onnx
from graphprune.export.write import export_onnx

INNER = 64
ROWS = np.random.default_rng(0).standard_normal((3, INNER), np.float32)


def weights_of(heights: list[int], formats: list[str], blocks: list[int]) -> list[quant.QuantizedTensor]:
    shapes = enumerate(zip(heights, formats, blocks, strict=True))
    return [random_weight((rows, INNER), format, block, seed) for seed, (rows, format, block) in shapes]


def products(
    weights: list[quant.QuantizedTensor], *, of_other_values: bool = False, layout: str = ""
) -> ir.Model:
    """Return what multiplies one value, or as many values, by matrices `w0`, `w1`, ...; the last result comes first."""

    def write(writer: GraphWriter, x: ir.Value) -> ir.Value:
        results = []
        for index, quantized in enumerate(weights):
            writer.label(f"w{index}")
            weight = PackedMatrix.of(f"w{index}", quantized)
            form = LAYOUTS[layout] if layout else choose_layout(weight)
            if of_other_values:
                shape, x = x.shape, writer.node("Neg", [x])
                x.shape = shape
            results.append(form.write(writer, x, weight))
        return writer.node("Concat", results[::-1], axis=-1)

    return build(1, ["rows", INNER], write)


def count(model: ir.Model) -> int:
    return sum(node.op_type == "MatMulNBits" for node in model.graph)


@quick
@given(
    format=st.sampled_from(quant.format_names()),
    heights=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    block=st.sampled_from([16, 32, 64]),
)
def test_one_product_computes_what_several_did(format: str, heights: list[int], block: int) -> None:
    weights = weights_of(heights, [format] * len(heights), [block] * len(heights))
    model = products(weights)
    before = run(model, ROWS)
    join_products(model.graph)
    assert count(model) == 1
    np.testing.assert_array_equal(run(model, ROWS), before)
    exact = choose_layout(PackedMatrix.of("w", weights[0])).exact(PackedMatrix.of("w", weights[0]))
    levels = levels_of(format) if exact else rounded_levels(levels_of(format))
    expected = [ROWS.astype(np.float64) @ reference(weight, levels).T for weight in reversed(weights)]
    np.testing.assert_allclose(before, np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("formats", "blocks", "left"),
    [
        (["int4", "int8", "int4"], [32, 32, 32], 2),
        (["int4", "int4", "int4"], [32, 64, 32], 2),
        (["int4", "nf4", "int8"], [32, 32, 32], 2),  # the latter two on the same kernel
        (["int4", "int2", "int8"], [32, 32, 32], 3),
    ],
    ids=["other bits", "other blocks", "a codebook in 8 bits", "nothing alike"],
)
def test_only_what_differs_in_its_rows_alone_is_joined(
    formats: list[str], blocks: list[int], left: int
) -> None:
    model = products(weights_of([5, 6, 7], formats, blocks))
    before = run(model, ROWS)
    join_products(model.graph)
    assert count(model) == left
    np.testing.assert_array_equal(run(model, ROWS), before)


def test_products_of_other_values_and_of_flat_blocks_stay() -> None:
    weights = weights_of([5, 6], ["int4", "int4"], [32, 32])
    model = products(weights, of_other_values=True)
    join_products(model.graph)
    assert count(model) == 2
    model = products(weights_of([5, 6], ["nf4", "nf4"], [32, 32]), layout="bnb4")
    nodes = list(model.graph)
    join_products(model.graph)
    assert list(model.graph) == nodes


def test_a_product_with_zero_points_stays() -> None:
    model = products(weights_of([5, 6, 7], ["int4"] * 3, [32] * 3))
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    zeros = ir.tensor(np.full((5, 1), 0x88, dtype=np.uint8))
    value = ir.Value(name="zeros", shape=zeros.shape, type=ir.TensorType(zeros.dtype), const_value=zeros)
    model.graph.register_initializer(value)
    node.resize_inputs(4)
    node.replace_input_with(3, value)
    before = run(model, ROWS)
    join_products(model.graph)
    assert count(model) == 2
    np.testing.assert_array_equal(run(model, ROWS), before)


@pytest.mark.parametrize("format", ["int4", "uint4", "uint3", "nf4"])
def test_each_weight_is_stored_as_before_and_read_by_its_name(format: str, tmp_path: Path) -> None:
    weights = weights_of([5, 6, 7], [format] * 3, [32] * 3)
    model = products(weights)
    before = {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()}
    join_products(model.graph)
    after = {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()}
    assert {name: after.get(name) for name in before} == before
    assert [name for name in after if name not in before] == ["shape.5.6.7"]
    ir.save(model, tmp_path / "model.onnx")
    levels = levels_of(format) if format != "nf4" else rounded_levels(levels_of(format))
    found = list(file_weights(tmp_path / "model.onnx"))
    assert [name for name, _ in found] == ["w0", "w1", "w2"]
    for (_, array), weight in zip(found, weights, strict=True):
        largest = float(weight.dequantize().abs().max())
        np.testing.assert_allclose(array, reference(weight, levels), rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("adapters", ["overridable", "constant"])
@pytest.mark.parametrize("format", ["int4", "uint4"])
def test_query_key_and_value_of_uneven_layers_with_biases(format: str, adapters: str, tmp_path: Path) -> None:
    model = tiny_uneven_qwen2()
    quant.loftq_model(model, quant.LoftQConfig(format=format, block_size=32, rank=3, iterations=1))
    model = randomize(model, seed=6)
    path = export_onnx(model, tmp_path / "onnx", adapters=adapters)
    found = verify_onnx(path, model, windows(20, 12))
    assert found.checks["weights"] < 5e-7
    assert found.max_relative_error < 2e-5
    operators = Counter(node.op_type for node in load(path).graph.node)
    # Of each layer query, key and value; their result; gate and up. In the second, rows of 100 weights fit no kernel.
    assert operators["MatMulNBits"] == 2 * 3 + len(["down", "head"])
    assert operators["Split"] == 2 * 2
    names = {name for name, _ in file_weights(path)}
    assert {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"} <= names
