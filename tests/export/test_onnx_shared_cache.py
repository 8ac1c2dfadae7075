"""A cache that is written where it lies: the same numbers as torch's, in buffers that are never copied."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from exported_models import randomize, tiny_falcon, tiny_gpt_neox, tiny_llama, tiny_uneven_qwen2, windows
from test_onnx_export import load
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import graphprune as gp
import quant
from graphprune.errors import ExportError, SourceError
from graphprune.export.genai import write_genai_config
from graphprune.export.runtime import OnnxDecoder
from graphprune.export.shared_cache import has_shared_cache, share_cache
from graphprune.export.verify import verify_onnx
from graphprune.export.verify_decoder import exact_decoder
from graphprune.export.write import export_onnx


def tiny_gemma2() -> nn.Module:
    """Softened scores, for which the tracer writes no Attention."""
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=99,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
        attn_implementation="eager",
    )
    return randomize(Gemma2ForCausalLM(config), seed=7)


def tiny_quantized() -> nn.Module:
    model = tiny_uneven_qwen2()
    quant.loftq_model(model, quant.LoftQConfig(format="int4", block_size=32, rank=2, iterations=1))
    return model.eval()


def ones(length: int) -> np.ndarray:
    return np.ones((1, length), np.int64)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tiny Llama's file with a shared cache."""
    return export_onnx(tiny_llama(), tmp_path_factory.mktemp("shared") / "onnx", cache="shared")


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """The same Llama's file with a cache that grows."""
    return export_onnx(tiny_llama(), tmp_path_factory.mktemp("growing") / "onnx")


@pytest.mark.parametrize("build", [tiny_gpt_neox, tiny_quantized, tiny_falcon])
def test_it_computes_what_torch_computes_in_place_too(build, tmp_path):
    model = build()
    path = export_onnx(model, tmp_path / "onnx", cache="shared")
    found = verify_onnx(path, model, windows(20, 12))
    assert found.max_relative_error < 2e-5
    assert found.checks["shared_cache"] < 2e-5
    assert "3x12 after 7" not in found.checks
    graph = load(path).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 2
    assert "Attention" not in kinds


def test_new_keys_are_written_behind_the_old_ones_and_the_rest_is_left_alone(shared):
    """In a buffer for 30 tokens of three texts, padded on the left; against the cache that grows."""
    decoder = exact_decoder(shared)
    ids = np.random.default_rng(0).integers(3, 60, (3, 9))
    mask = (np.arange(9) >= np.array([[0], [2], [5]])).astype(np.int64)
    past = decoder.shared_past(3, 30)
    addresses = [buffer.data_ptr() for buffer in past]
    first = decoder.step_in_place(ids[:, :8], mask[:, :8], past)
    second = decoder.step_in_place(ids[:, 8:], mask, past)
    expected, grown = decoder.step(ids[:, :8], mask[:, :8])
    np.testing.assert_array_equal(first, expected)
    expected, grown = decoder.step(ids[:, 8:], mask, grown)
    np.testing.assert_allclose(second, expected, atol=1e-6)
    assert [buffer.data_ptr() for buffer in past] == addresses
    for buffer, whole in zip(past, grown, strict=True):
        np.testing.assert_allclose(buffer.numpy()[:, :, :9], whole, atol=1e-6)
        assert not buffer.numpy()[:, :, 9:].any()


def test_genai_is_told_that_the_buffer_is_shared(shared, growing):
    for path in (growing, shared):
        settings = {"hidden_size": 32, "num_attention_heads": 4, "context_length": 64, "eos_token_ids": [2]}
        config = json.loads(write_genai_config(path.parent, **settings).read_text())
        assert config["search"]["past_present_share_buffer"] == (path == shared)


def test_such_a_file_is_cut_as_one_whose_cache_grows(shared, growing, tmp_path):
    """Its masks are of the tokens that there are, its buffers of more."""
    ids = np.random.default_rng(1).integers(3, 60, (1, 12))
    cut = []
    for path in (growing, shared):
        groups = gp.node_groups(gp.trace(path))
        first = {group.kind: name for name, group in groups.items() if group.prunable}
        plan = gp.Plan({first["attention_heads"]: [1], first["ffn"]: range(16)})
        small = tmp_path / path.parents[1].name / "model.onnx"
        small.parent.mkdir()
        ir.save(gp.shrink(None, groups, plan), small, external_data="model.onnx.data")
        cut.append(OnnxDecoder(small))
    grows, shares = cut
    past = shares.shared_past(1, 30)
    assert past[-1].shape()[1] == 1
    steps = [
        shares.step_in_place(ids[:, :7], ones(7), past),
        shares.step_in_place(ids[:, 7:], ones(12), past),
    ]
    np.testing.assert_allclose(np.concatenate(steps, 1), grows.logits(ids), atol=1e-5)


def test_several_tokens_of_several_texts_behind_earlier_ones_are_refused_in_words(shared):
    decoder = OnnxDecoder(shared)
    ids = np.random.default_rng(0).integers(3, 60, (2, 9))
    past = decoder.step(ids[:, :4])[1]
    with pytest.raises(SourceError, match="batch_size must be 1"):
        decoder.step(ids[:, 4:], past=past)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "static"}, r"no cache 'static'\n.*growing, shared"),
        ({"cache": "shared", "profile": "portable"}, r"portable has none of these\n.*cache='growing'"),
        ({"cache": "shared", "examples": {}}, "of causal language models"),
    ],
)
def test_what_cannot_share_is_refused_before_anything_is_traced(settings, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_onnx(nn.Linear(2, 2), tmp_path / "onnx", **settings)


def test_heads_of_a_size_that_the_operator_does_not_take_are_told(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=40, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=67
    )
    with pytest.raises(ExportError, match=r"heads of 10.*multiple of 8\n.*growing"):
        export_onnx(randomize(LlamaForCausalLM(config), 0), tmp_path / "onnx", cache="shared")
    assert not (tmp_path / "onnx").exists()


def test_attention_that_is_no_one_operator_is_told_with_its_cache(tmp_path):
    with pytest.raises(ExportError, match=r"past_key_values\.0\.key is read by Concat.*\n.*growing"):
        export_onnx(tiny_gemma2(), tmp_path / "onnx", cache="shared")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("truths", [True, False])
def test_what_is_masked_or_added_to_scores_is_so_afterwards(truths):
    """One Attention behind a cache of three tokens, its mask of truths, or of numbers such as ALiBi's."""
    generator = np.random.default_rng(5)
    numbers = generator.standard_normal((1, 1, 4, 7)).astype(np.float32)
    earlier = np.tri(4, 7, 3, dtype=bool)
    mask = earlier & ((numbers > -0.5) | (np.arange(7) == 0)) if truths else np.where(earlier, numbers, -1e9)
    arrays = {
        "input_ids": np.zeros((1, 4), np.int64),
        "attention_mask": np.ones((1, 7), np.int64),
        "query": generator.standard_normal((1, 4, 32)).astype(np.float32),
        "key": generator.standard_normal((1, 4, 16)).astype(np.float32),
        "value": generator.standard_normal((1, 4, 16)).astype(np.float32),
        "mask": mask if truths else mask.astype(np.float32),
        "past_key_values.0.key": generator.standard_normal((1, 2, 3, 8)).astype(np.float32),
        "past_key_values.0.value": generator.standard_normal((1, 2, 3, 8)).astype(np.float32),
    }
    names = {3: "past", 4: "tokens", 7: "all_tokens"}
    given = {
        name: ir.Value(
            name=name,
            shape=ir.Shape(["batch", *(names.get(size, size) for size in array.shape[1:])]),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        for name, array in arrays.items()
    }
    fused = ir.node(
        "Attention",
        [given[name] for name in list(arrays)[2:]],
        {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3},
        num_outputs=3,
    )
    graph = ir.Graph(given.values(), fused.outputs, nodes=[fused], opset_imports={"": 23, "com.microsoft": 1})
    for number, output in enumerate(graph.outputs):
        output.name, output.type = f"output.{number}", ir.TensorType(ir.DataType.FLOAT)
    expected = computed(graph, arrays)
    share_cache(graph, given)
    assert has_shared_cache(graph)
    for ours, theirs in zip(computed(graph, arrays), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def computed(graph: ir.Graph, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    return session.run(None, {name: array for name, array in arrays.items() if name in taken})
