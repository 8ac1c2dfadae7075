"""Whole runs of models that no Llama prepares for: Conv1D, other linear layers, experts, no widths to set."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import graphprune
from graphprune.errors import BudgetError
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.run import run
from quant.storage import read_index

SPECIAL = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**SPECIAL, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=128))


def falcon():
    return FalconForCausalLM(
        FalconConfig(
            **SPECIAL,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            ffn_hidden_size=64,
        )
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    )


def gemma3():
    config = Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
    return Gemma3ForCausalLM(config)


def bloom():
    """Its configuration sets no width of the feed-forward layer, and no position has a number."""
    return BloomForCausalLM(BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4))


def recipe_of(bench, folder: Path, model, *changes: tuple[str, str]) -> Path:
    """Save a model with random weights and the workbench's tokenizer, and return the workbench's recipe of it."""
    torch.manual_seed(0)
    model.save_pretrained(folder / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tiny" / name).write_bytes((bench.model / name).read_bytes())
    for name in ("train.txt", "evaluate.txt"):
        (folder / name).write_bytes((bench.folder / name).read_bytes())
    text = bench.recipe.read_text()
    for old, new in (("width_multiple: {ffn: 16}", "width_multiple: {ffn: 8}"), *changes):
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def initializers(path: Path) -> dict[str, int]:
    graph = onnx.load(path, load_external_data=False).graph
    return {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("build", [gpt2, falcon, gemma3])
def test_every_matrix_of_the_blocks_is_packed(bench, tmp_path, build):
    """What stock classes have no setting for stays whole; the stock class opens what is left."""
    dense = build()
    report = run(recipe_of(bench, tmp_path, dense), tmp_path / "RUN", Reporter(None))
    assert report.certificate.ok
    assert abs(report.parameters.removed_share - 0.2) < 0.08
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "RUN" / "model")
    assert small.config.num_attention_heads in (4, 2)
    assert sum(p.numel() for p in small.parameters()) == report.parameters.after
    packed = read_index(tmp_path / "RUN" / "quant")["layers"]
    matrices = {
        name.removesuffix(".weight")
        for name, parameter in small.named_parameters()
        if parameter.dim() == 2 and ".wpe." not in name
    }
    assert matrices <= packed.keys()
    assert {layer["kind"] for layer in packed.values()} == {"linear", "embedding"}


def test_experts_are_pruned_and_packed_but_their_router_stays(bench, tmp_path):
    report = run(recipe_of(bench, tmp_path, mixtral()), tmp_path / "RUN", Reporter(None))
    assert report.certificate.ok
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "RUN" / "model")
    assert small.config.intermediate_size < 64
    packed = read_index(tmp_path / "RUN" / "quant")["layers"]
    stacks = {name: layer for name, layer in packed.items() if layer["kind"] == "parameter"}
    assert {name for name, parameter in small.named_parameters() if parameter.dim() == 3} == stacks.keys()
    assert {layer["format"] for layer in stacks.values()} == {"nf4"}
    assert {layer["rank"] for layer in stacks.values()} == {0}
    assert not any("gate.weight" in name or name.endswith(".gate") for name in packed)
    floats = [
        name for name, kind in initializers(tmp_path / "RUN/onnx/model.onnx").items() if "experts" in name
    ]
    assert floats
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in floats)


def test_a_class_without_any_width_to_set_is_refused_with_the_way_that_works(bench, tmp_path):
    recipe = recipe_of(bench, tmp_path, bloom())
    with pytest.raises(
        BudgetError, match=r"BloomConfig refuses \(attention_heads: all; ffn: all\)\n.*per_layer"
    ):
        run(recipe, tmp_path / "RUN", Reporter(None))
    recipe = recipe_of(
        bench, tmp_path, bloom(), ("  remove: 0.2", "  remove: 0.1\n  layout: per_layer\n  kinds: [ffn]")
    )
    report = run(recipe, tmp_path / "RUN", Reporter(None), fresh=True)
    assert report.parameters.after < report.parameters.before
    small = graphprune.load(tmp_path / "RUN" / "model")
    assert sum(p.numel() for p in small.parameters()) == report.parameters.after
    length = json.loads((tmp_path / "RUN/onnx/genai_config.json").read_text())["model"]["context_length"]
    assert length == 2048


def test_kinds_that_are_asked_for_by_name_are_not_left_out_silently(bench, tmp_path):
    recipe = recipe_of(
        bench, tmp_path, gpt2(), ("  remove: 0.2", "  remove: 0.2\n  kinds: [ffn, attention_heads]")
    )
    with pytest.raises(graphprune.errors.ShrinkError, match="no setting of GPT2Config"):
        run(recipe, tmp_path / "RUN", Reporter(None))
