"""Biases in stock classes: which switch gives a layer one is found by building."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from graphprune.errors import ShrinkError
from graphprune.shrink.biases import allow_biases, config_with_biases

IDS = torch.arange(24).reshape(2, 12)
DOWN, OUT = "model.layers.0.mlp.down_proj.bias", "model.layers.1.self_attn.o_proj.bias"


def switches(config: LlamaConfig) -> set[str]:
    return {name for name in ("mlp_bias", "attention_bias") if getattr(config, name)}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [([], set()), ([DOWN], {"mlp_bias"}), ([OUT], {"attention_bias"}), ([DOWN, OUT], {"mlp_bias", "attention_bias"})],
)  # fmt: skip
def test_only_the_switches_that_are_needed_are_turned(wanted, expected):
    model = tiny_llama()
    assert switches(config_with_biases(type(model), model.config, wanted)) == expected
    assert switches(model.config) == set()


def test_a_bias_comes_back_from_a_folder_and_the_others_with_it_are_zero(tmp_path):
    model = tiny_llama()
    plain = copy.deepcopy(model)
    layer = model.model.layers[0].mlp.down_proj
    layer.bias = nn.Parameter(torch.arange(32) / 32)
    with torch.no_grad():
        expected = model(IDS).logits
        model.config = allow_biases(plain.config, model)
        torch.testing.assert_close(model(IDS).logits, expected)
        model.save_pretrained(tmp_path)
        reopened = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(reopened(IDS).logits, model(IDS).logits)
        assert not torch.allclose(plain(IDS).logits, expected, atol=1e-3)
    assert torch.equal(reopened.model.layers[0].mlp.down_proj.bias, layer.bias)
    assert not reopened.model.layers[1].mlp.down_proj.bias.any()
    assert reopened.model.layers[0].mlp.gate_proj.bias.shape == (48,)


def test_a_class_that_has_no_place_for_a_bias_is_named():
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=67,
    )
    with pytest.raises(ShrinkError, match=r"Qwen2ForCausalLM has no place for model.* and 1 more: no switch"):
        config_with_biases(Qwen2ForCausalLM, config, [DOWN, OUT])


class Refusing(nn.Linear):
    """A class that knows no biases, and refuses some of its configuration's switches."""

    def __init__(self, config):
        if config.mlp_bias or config.vocab_size == 0:
            raise KeyError("no such thing")  # of a kind that nobody would think of
        super().__init__(4, 4, bias=False)


def test_what_a_class_refuses_is_told_and_not_passed_over():
    config = LlamaConfig()
    with pytest.raises(ShrinkError, match=r"no switch of .* \(it cannot be built with mlp_bias\)"):
        config_with_biases(Refusing, config, ["weight", "bias"])
    config.vocab_size = 0
    with pytest.raises(ShrinkError, match="Refusing cannot be built from its configuration: 'no such thing'"):
        config_with_biases(Refusing, config, ["weight"])


class Widening(nn.Linear):
    """A class whose switch brings more than biases."""

    def __init__(self, config):
        super().__init__(4, 4, bias=config.mlp_bias)
        if config.mlp_bias:
            self.gate = nn.Linear(4, 4, bias=False)


def test_a_switch_that_brings_more_than_biases_is_none():
    with pytest.raises(ShrinkError, match="no switch of LlamaConfig"):
        config_with_biases(Widening, LlamaConfig(), ["weight", "bias"])
