"""What an exported file is: names, shapes, sizes, weights, and that it computes what the model computes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_models import LAYERS, RANK, VOCABULARY, Exported, tiny_llama, tiny_uneven_qwen2, windows
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import quant
from graphprune.errors import ExportError
from graphprune.export.adapter_file import BASE, base_digest
from graphprune.export.runtime import OnnxDecoder
from graphprune.export.stand_ins import replaced
from graphprune.export.verify import verify_onnx
from graphprune.export.write import export_onnx


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path), load_external_data=False)


def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in values
    }


def quantized_layers(model: nn.Module) -> dict[str, quant.QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, quant.QuantLinear)}


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_names_and_symbols_are_those_of_the_documentation(kind: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(kind)
    graph = load(exported.path).graph
    overridable = {value.name for value in graph.initializer}
    inputs = {name: shape for name, shape in shapes(list(graph.input)).items() if name not in overridable}
    cache = [(layer, part) for layer in range(LAYERS) for part in ("key", "value")]
    tokens: list[int | str] = ["batch_size", "sequence_length"]
    assert inputs == {
        "input_ids": tokens,
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": tokens,
    } | {f"past_key_values.{n}.{part}": ["batch_size", 2, "past_sequence_length", 16] for n, part in cache}
    assert shapes(list(graph.output)) == {"logits": [*tokens, VOCABULARY]} | {
        f"present.{n}.{part}": ["batch_size", 2, "total_sequence_length", 16] for n, part in cache
    }


def test_the_file_is_valid_and_of_opset_23_with_the_callers_metadata(packed: Exported) -> None:
    onnx.checker.check_model(str(packed.path), full_check=True)
    proto = load(packed.path)
    assert {opset.domain: opset.version for opset in proto.opset_import} == {"": 23, "com.microsoft": 1}
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata == {"graphprune": "a test", BASE: base_digest(packed.model)}
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


def test_only_two_files_are_written_and_the_graph_is_small(packed: Exported) -> None:
    assert {file.name for file in packed.path.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    nodes = len(load(packed.path).graph.node)
    assert packed.path.stat().st_size < 600 * nodes
    assert [file.name for file in packed.path.parent.parent.iterdir()] == ["onnx"]


def test_packed_weights_take_their_bits_and_nothing_else(packed: Exported) -> None:
    bits = 0
    for name, layer in quantized_layers(packed.model).items():
        rows, columns = layer.quantized.shape
        if name == "lm_head":
            bits += rows * columns * 8 + rows * columns // 32 * 32
        else:
            bits += rows * columns * 4 + rows * columns // 64 * 32 + RANK * (rows + columns) * 32
    other = sum(p.nbytes for name, p in packed.model.named_parameters() if "lora" not in name)
    graph = load(packed.path).graph
    stored = sum(
        np.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        for t in graph.initializer
    )
    assert 0 <= stored - bits / 8 - other < 2000  # one table of 512 bytes, shapes and constants
    assert (packed.path.parent / "model.onnx.data").stat().st_size < 1.2 * stored


def test_attention_norms_and_rotary_embeddings_are_single_operators(packed: Exported) -> None:
    count = Counter(node.op_type for node in load(packed.path).graph.node)
    assert count["Attention"] == LAYERS
    assert count["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
    assert count["RMSNormalization"] == 1  # the first, which no sum comes before
    assert count["Transpose"] == 0
    assert count["RotaryEmbedding"] == 2 * LAYERS
    assert count["MatMulNBits"] == 4 * LAYERS + 1  # query, key and value are one product, gate and up another
    assert count["Softmax"] == 0


def test_keys_and_values_reach_attention_without_being_repeated(dense: Exported) -> None:
    attentions = [node for node in load(dense.path).graph.node if node.op_type == "Attention"]
    for index, node in enumerate(attentions):
        assert list(node.input[4:]) == [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        assert list(node.output[1:]) == [f"present.{index}.{part}" for part in ("key", "value")]
        heads = {attribute.name: attribute.i for attribute in node.attribute}
        config = dense.model.config
        assert heads["kv_num_heads"] == config.num_key_value_heads < config.num_attention_heads
        assert heads["q_num_heads"] == config.num_attention_heads


def test_the_tied_table_is_stored_once(packed: Exported, dense: Exported) -> None:
    for exported in (packed, dense):
        sizes = [int(np.prod(t.dims)) for t in load(exported.path).graph.initializer]
        assert sizes.count(VOCABULARY * 64) == 1


def test_parameters_keep_their_names(dense: Exported) -> None:
    stored = {tensor.name: list(tensor.dims) for tensor in load(dense.path).graph.initializer}
    for name, parameter in dense.model.named_parameters():
        assert stored[name] == list(parameter.shape)


def test_adapters_are_initializers_that_a_session_can_override(packed: Exported) -> None:
    session = onnxruntime.InferenceSession(str(packed.path), providers=["CPUExecutionProvider"])
    overridable = {value.name: value.shape for value in session.get_overridable_initializers()}
    layers = {n: layer for n, layer in quantized_layers(packed.model).items() if layer.lora_A is not None}
    assert len(overridable) == 2 * len(layers) > 0
    for name, layer in layers.items():
        assert overridable[f"{name}.lora_A.weight"] == [layer.in_features, "lora_rank"]
        assert overridable[f"{name}.lora_B.weight"] == ["lora_rank", layer.out_features]


def test_adapters_of_another_rank_can_be_fed(packed: Exported, packed_model: nn.Module) -> None:
    """Fed adapters of rank 2, the file computes what the model computes with these."""
    session = onnxruntime.InferenceSession(str(packed.path), providers=["CPUExecutionProvider"])
    ids = np.array(windows(9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(9)[None]}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=np.float32)
    random = np.random.default_rng(0)
    for value in session.get_overridable_initializers():
        shape = [2 if axis == "lora_rank" else axis for axis in value.shape]
        feeds[value.name] = random.standard_normal(shape, dtype=np.float32) * 0.2
    fed = session.run(["logits"], feeds)[0]

    def difference() -> float:
        with torch.no_grad():
            return float(np.abs(packed_model(torch.from_numpy(ids)).logits.numpy() - fed).max())

    assert difference() > 1
    for name, layer in quantized_layers(packed_model).items():
        if layer.lora_A is not None:
            layer.scaling = 1.0
            layer.lora_A = nn.Parameter(torch.from_numpy(feeds[f"{name}.lora_A.weight"].T))
            layer.lora_B = nn.Parameter(torch.from_numpy(feeds[f"{name}.lora_B.weight"].T))
    assert difference() < 0.2


@pytest.mark.parametrize(
    ("batch", "sequence", "past"), [(1, 1, 0), (1, 1, 5), (1, 6, 0), (3, 1, 4), (3, 4, 2)]
)
def test_any_batch_sequence_and_past(dense: Exported, batch: int, sequence: int, past: int) -> None:
    decoder = OnnxDecoder(dense.path)
    ids = np.array(windows(*[past + sequence] * batch), dtype=np.int64)
    cache = decoder.step(ids[:, :past])[1] if past else None
    logits, present = decoder.step(ids[:, past:], past=cache)
    with torch.no_grad():
        expected = dense.model(torch.from_numpy(ids)).logits.numpy()[:, past:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert {tensor.shape for tensor in present} == {(batch, 2, past + sequence, 16)}


def test_padding_on_the_left_changes_nothing(dense: Exported) -> None:
    decoder = OnnxDecoder(dense.path)
    (short,) = windows(5)
    alone = decoder.logits(np.array([short]))
    for padding in (1, 4):
        ids = np.array([[0] * padding + short])
        mask = np.array([[0] * padding + [1] * 5])
        np.testing.assert_allclose(decoder.logits(ids, mask)[:, padding:], alone, rtol=0, atol=1e-5)


def test_another_architecture_gpt2(learned_positions: Exported) -> None:
    verification = verify_onnx(learned_positions.path, learned_positions.model, windows(20, 12))
    assert verification.max_relative_error < 1e-5
    assert verification.top1_agreement == 1.0


def test_uneven_layers_with_biases_in_an_exact_file(tmp_path: Path) -> None:
    """Rows of 100 weights share blocks with the next row: only the flat blocks of MatMulBnb4 hold them."""
    model = tiny_uneven_qwen2()
    quant.loftq_model(model, quant.LoftQConfig(rank=2, iterations=1))
    path = export_onnx(model, tmp_path / "onnx", exact=True)
    verification = verify_onnx(path, model, windows(20, 12))
    assert verification.checks["weight_rounding"] < 5e-7
    assert verification.max_relative_error < 1e-5
    graph = load(path).graph
    heads = {name: shape[1] for name, shape in shapes(list(graph.input)).items() if name.startswith("past")}
    assert list(heads.values()) == [2, 2, 1, 1]
    operators = Counter(node.op_type for node in graph.node)
    assert (operators["MatMulBnb4"], operators["MatMulNBits"]) == (15, 0)


def test_the_callers_model_is_untouched_even_after_a_failure(dense: Exported, tmp_path: Path) -> None:
    model = dense.model.train()
    modules = dict(model.named_modules())
    environment = dict(os.environ)
    forward = model.model.layers[1].mlp.forward

    def branches_on_data(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting() and float(x.sum()) > 0:
            return x
        return forward(x)

    model.model.layers[1].mlp.forward = branches_on_data
    try:
        with pytest.raises(ExportError, match="could not be translated"):
            export_onnx(model, tmp_path / "onnx")
        assert model.training
        assert dict(model.named_modules()) == modules
        assert dict(os.environ) == environment
        assert list(tmp_path.iterdir()) == []
    finally:
        del model.model.layers[1].mlp.forward
        model.eval()


def test_replaced_modules_come_back_after_an_error(dense: Exported) -> None:
    original = dense.model.get_submodule("lm_head")

    def fail() -> None:
        with replaced(dense.model, {"lm_head": nn.Identity()}):
            assert isinstance(dense.model.get_submodule("lm_head"), nn.Identity)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert dense.model.get_submodule("lm_head") is original


def test_a_model_in_double_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch.float64.*\n.*torch.float32"):
        export_onnx(tiny_llama().double(), tmp_path / "onnx")


def test_a_model_without_a_cache_is_refused(tmp_path: Path) -> None:
    class NoCache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Embedding(9, 3)

        def forward(self, input_ids: torch.Tensor, **rest: object) -> torch.Tensor:
            return self.layer(input_ids)

    with pytest.raises(ExportError, match=r"NoCache gives no key-value cache back\n.*examples=inputs"):
        export_onnx(NoCache(), tmp_path / "onnx")
    with pytest.raises(ExportError, match=r"does not run as a decoder with a cache.*\n.*examples=inputs"):
        export_onnx(nn.Linear(2, 2), tmp_path / "onnx")
    encoder = BertForMaskedLM(
        BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=9
        )
    )
    with pytest.raises(ExportError, match="BertForMaskedLM gives no key-value cache back"):
        export_onnx(encoder, tmp_path / "onnx")


def test_a_file_in_the_folders_place_stays(packed_model: nn.Module, tmp_path: Path) -> None:
    place = tmp_path / "thesis"
    place.write_text("mine")
    with pytest.raises(ExportError, match="is a file"):
        export_onnx(packed_model, str(place))
    assert place.read_text() == "mine"
