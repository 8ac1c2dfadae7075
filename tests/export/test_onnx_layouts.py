"""Each ONNX form of a packed weight, on one-node graphs, against `quant`'s own dequantization in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quant
from graphprune.errors import ExportError
from graphprune.export.embeddings import write_embedding
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.layouts import LAYOUTS, PROFILES, choose_layout, rounded_levels
from graphprune.export.layouts.byte_table import byte_denominator
from graphprune.export.layouts.codes import codebook_codes, nibbles
from graphprune.export.packed_matrix import PackedMatrix, pack

quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
formats = st.sampled_from(quant.format_names())
block_sizes = st.sampled_from([16, 32, 64, 128])
# Rows of whole blocks, of parts of blocks, of nothing that fits a kernel, and of an odd number of weights.
columns = st.sampled_from([16, 32, 48, 64, 96, 100, 128, 33, 20, 7])
rows = st.integers(1, 9)
seeds = st.integers(0, 2**31 - 1)
storages = st.sampled_from(["float32", "float16", "double"])
profiles = st.sampled_from(sorted(PROFILES))


def random_weight(
    shape: tuple[int, int], format: str, block_size: int, seed: int, storage: str = "float32"
) -> quant.QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) + torch.randn(shape[0], 1, generator=generator)
    return quant.quantize(weight, format, block_size, scale_storage=storage)


def reference(quantized: quant.QuantizedTensor, levels: np.ndarray) -> np.ndarray:
    """levels[code] * absmax + offset in float64, element by element of the flat order."""
    codes = quantized.unpacked_codes().numpy().reshape(-1)
    block = np.arange(codes.size) // quantized.block_size
    scaled = levels.astype(np.float64)[codes] * quantized.absmax.numpy().astype(np.float64)[block]
    offsets = 0 if quantized.offsets is None else quantized.offsets.values().double().numpy()[block]
    return (scaled + offsets).reshape(quantized.shape)


def levels_of(format: str) -> np.ndarray:
    return quant.get_format(format).levels.numpy()


def build(kind: int, shape: list[int | str], write) -> ir.Model:  # type: ignore[no-untyped-def]
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType(kind)))
    placeholder = ir.node("Placeholder", [x], domain="test")
    placeholder.outputs[0].name = "y"
    placeholder.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    placeholder.outputs[0].shape = ir.Shape([None] * (2 if kind == 1 else 3))
    opsets = {"": 23, "com.microsoft": 1}
    graph = ir.Graph([x], [placeholder.outputs[0]], nodes=[placeholder], opset_imports=opsets, name="test")
    writer = GraphWriter(graph)
    writer.begin("matrix")
    writer.replace(placeholder, write(writer, x))
    for node in graph:
        node.attributes.pop("accuracy_level", None)
    return ir.Model(graph, ir_version=11)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def matrix_in(model: ir.Model, columns: int) -> np.ndarray:
    """Read the weight out of a product by feeding it the identity."""
    return run(model, np.eye(columns, dtype=np.float32)).T


@quick
@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    format=formats,
    block=block_sizes,
    n=rows,
    k=columns,
    storage=storages,
    seed=seeds,
)
def test_every_layout_multiplies_by_the_dequantized_weight(
    name: str, format: str, block: int, n: int, k: int, storage: str, seed: int
) -> None:
    quantized = random_weight((n, k), format, block, seed, storage)
    weight = PackedMatrix.of("w", quantized)
    form = LAYOUTS[name]
    if not form.fits(weight):
        return
    model = build(1, ["rows", k], lambda writer, x: form.write(writer, x, weight))
    found = matrix_in(model, k)
    levels = levels_of(format) if form.exact(weight) else rounded_levels(levels_of(format))
    assert found.shape == (n, k)
    largest = float(quantized.dequantize().abs().max())
    np.testing.assert_allclose(found, reference(quantized, levels), rtol=0, atol=2e-6 * largest)


@quick
@given(format=formats, block=block_sizes, n=rows, k=columns, storage=storages, profile=profiles, seed=seeds)
def test_an_embedding_looks_up_the_dequantized_rows(
    format: str, block: int, n: int, k: int, storage: str, profile: str, seed: int
) -> None:
    quantized = random_weight((n, k), format, block, seed, storage)
    weight = PackedMatrix.of("w", quantized)
    ids = np.random.default_rng(seed).integers(0, n, (2, 3))
    model = build(7, ["batch", "sequence"], lambda writer, x: write_embedding(writer, x, weight, profile))
    found = run(model, ids)
    largest = float(quantized.dequantize().abs().max())
    np.testing.assert_allclose(
        found, reference(quantized, levels_of(format))[ids], rtol=0, atol=2e-6 * largest
    )


@pytest.mark.parametrize("format", quant.format_names())
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_weight_has_a_layout(profile: str, format: str, exact: bool) -> None:
    for k in (64, 48, 100, 7):
        weight = PackedMatrix.of("w", random_weight((3, k), format, 64, 0))
        form = choose_layout(weight, profile, exact=exact)
        assert form.fits(weight)
        assert form.exact(weight) or not exact


def test_which_layout_is_chosen() -> None:
    def chosen(format: str, k: int, exact: bool = False, profile: str = "cpu") -> str:
        weight = PackedMatrix.of("w", random_weight((4, k), format, 64, 0))
        return choose_layout(weight, profile, exact=exact).name

    assert [chosen(f, 64) for f in ("int2", "int3", "int4", "int8")] == ["grid"] * 4
    assert [chosen(f, 64) for f in ("nf2", "nf3", "nf4")] == ["byte_table"] * 3
    assert [chosen(f, 64) for f in ("uint2", "uint3", "uint4", "uint8")] == ["grid"] * 4
    assert [chosen(f, 64, profile="cuda") for f in ("nf4", "nf3")] == ["bnb4", "byte_table"]
    assert [chosen(f, 64, profile="portable") for f in ("uint3", "nf4", "int4")] == ["dequantize"] * 3
    assert chosen("nf4", 64, exact=True, profile="portable") == "unpacked"
    assert chosen("fp4", 64, exact=True) == "byte_table"
    assert chosen("nf4", 48) == "byte_table"
    assert chosen("nf4", 100) == "bnb4"
    assert chosen("int4", 100) == "unpacked"
    assert [chosen(f, 64, exact=True) for f in ("nf2", "nf3", "nf4")] == ["bnb4", "unpacked", "bnb4"]


@pytest.mark.parametrize(
    "format", [name for name in quant.format_names() if not quant.get_format(name).affine]
)
def test_the_byte_table_rounds_levels_to_the_best_grid(format: str) -> None:
    levels = levels_of(format).astype(np.float64)
    rounded = rounded_levels(levels_of(format))
    error = np.abs(rounded - levels).max()
    every_grid = [np.abs(np.round(levels * d) / d - levels).max() for d in range(1, 128)]
    assert error <= min(every_grid) + 1e-7
    assert error < 0.0036
    assert rounded[np.abs(levels).argmin()] == 0 or 0 not in levels


def test_nf4_on_the_byte_table_is_at_most_the_documented_error_away() -> None:
    assert byte_denominator(tuple(levels_of("nf4").tolist())) == 123
    assert byte_denominator(tuple(levels_of("nf2").tolist())) == 74


@pytest.mark.parametrize("format", quant.format_names())
@pytest.mark.parametrize("storage", ["float32", "float16", "double"])
@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_a_file_holds_no_more_than_codes_and_scales_as_they_are_stored(
    profile: str, storage: str, format: str
) -> None:
    quantized = random_weight((128, 256), format, 64, 0, storage)
    weight = PackedMatrix.of("w", quantized)
    model = build(1, ["rows", 256], lambda w, x: choose_layout(weight, profile).write(w, x, weight))
    stored = {name: value.const_value.nbytes for name, value in model.graph.initializers.items()}
    assert sum(size for name, size in stored.items() if name.startswith("w.")) == quantized.nbytes
    assert sum(size for name, size in stored.items() if not name.startswith("w.")) < 9000  # tables, shapes


def test_the_portable_profile_has_standard_operators_alone() -> None:
    for format in quant.format_names():
        for k in (64, 100):
            weight = PackedMatrix.of("w", random_weight((4, k), format, 64, 0))

            def both(writer: GraphWriter, ids: ir.Value, weight: PackedMatrix = weight) -> ir.Value:
                rows = write_embedding(writer, ids, weight, "portable")
                rows.shape = ir.Shape([None, None, weight.in_features])
                return choose_layout(weight, "portable").write(writer, rows, weight)

            model = build(7, ["batch", "sequence"], both)
            assert {node.domain for node in model.graph} == {""}


@quick
@given(bits=st.sampled_from([1, 2]), count=st.integers(1, 40), low_first=st.booleans(), seed=seeds)
def test_nibbles_hold_the_values_of_codes_in_order(bits: int, count: int, low_first: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**bits, 8 * count).astype(np.uint8)
    values = tuple(generator.integers(0, 16, 2**bits).tolist())

    def write(writer: GraphWriter, x: ir.Value) -> ir.Value:
        plane = writer.initializer("plane", lambda: pack(codes, bits))
        spread = nibbles(writer, plane, values, low_first=low_first)
        return writer.node("Add", [x, writer.node("Cast", [spread], to=ir.DataType.FLOAT.value)])

    found = run(build(1, [1, 4 * count], write), np.zeros((1, 4 * count), dtype=np.float32))[0].astype(
        np.uint8
    )
    first, second = (found & 15, found >> 4) if low_first else (found >> 4, found & 15)
    assert np.stack([first, second], axis=1).reshape(-1).tolist() == [values[code] for code in codes]


@quick
@given(bits=st.sampled_from([1, 2, 4, 8]), count=st.integers(1, 50), seed=seeds)
def test_packing_is_undone_by_shifting(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    per_byte = 8 // bits
    high, low = pack(codes, bits), pack(codes, bits, low_first=True)
    assert len(high) == len(low) == -(-count // per_byte)
    for i, code in enumerate(codes):
        place = bits * (i % per_byte)
        assert (int(low[i // per_byte]) >> place) & (2**bits - 1) == code
        assert (int(high[i // per_byte]) >> (8 - bits - place)) & (2**bits - 1) == code


def test_bytes_are_packed_as_quant_packs_them() -> None:
    quantized = random_weight((5, 20), "nf4", 16, 3)
    weight = PackedMatrix.of("w", quantized)
    stored: list[np.ndarray] = []

    def write(writer: GraphWriter, x: ir.Value) -> ir.Value:
        stored.append(codebook_codes(writer, weight).const_value.numpy())
        return writer.node("Identity", [x])

    build(1, ["rows", 20], write)
    assert np.array_equal(stored[0], quantized.codes.numpy())


def test_a_layout_that_does_not_fit_says_so() -> None:
    weight = PackedMatrix.of("w", random_weight((4, 100), "int4", 64, 0))
    uneven = replace(weight, levels=np.array([-1, -0.3, 0, 1], dtype=np.float32), codes=weight.codes % 4)
    for name, wrong in (("grid", weight), ("byte_table", weight), ("bnb4", uneven)):
        assert not LAYOUTS[name].fits(wrong)
        with pytest.raises(ExportError, match="use another layout"):
            build(1, ["rows", 100], lambda w, x, name=name, wrong=wrong: LAYOUTS[name].write(w, x, wrong))


@pytest.mark.parametrize("format", ["int8", "uint8", "uint3", "nf4"])
def test_a_tied_head_and_embedding_are_stored_once(format: str) -> None:
    weight = PackedMatrix.of("w", random_weight((6, 64), format, 32, 0))
    stored: list[set[str]] = []

    def both(writer: GraphWriter, ids: ir.Value) -> ir.Value:
        hidden = write_embedding(writer, ids, weight)
        stored.append({name for name in writer._graph.initializers if name.startswith("w.")})
        hidden.shape = ir.Shape([None, None, 64])
        logits = choose_layout(weight).write(writer, hidden, weight)
        stored.append({name for name in writer._graph.initializers if name.startswith("w.")})
        return logits

    model = build(7, ["batch", "sequence"], both)
    assert stored[0] == stored[1]
    dense = reference(random_weight((6, 64), format, 32, 0), levels_of(format))
    head = (
        dense
        if format != "nf4"
        else reference(random_weight((6, 64), format, 32, 0), rounded_levels(levels_of(format)))
    )
    ids = np.array([[0, 5, 2]])
    np.testing.assert_allclose(run(model, ids), dense[ids] @ head.T, rtol=1e-5, atol=1e-4)
