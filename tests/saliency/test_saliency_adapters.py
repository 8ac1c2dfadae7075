"""Low-rank updates are found in the graph and give the weight in effect."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import randomized, tiny_llama, traced
from torch import nn

from graphprune.saliency import effective
from graphprune.saliency.adapters import Factors, low_rank_updates
from graphprune.saliency.effective import effective_weights
from graphprune.source.adapters import attach_adapters
from graphprune.trace.model import trace


def merged_weights(model, adapters=None):
    """The weights that PEFT itself makes of base and adapters, by the names that they had before."""
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=adapters).state_dict()
    return {
        name: merged[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        for name in model.state_dict()
        if "base_layer.weight" in name
    }


def check_against(found, merged):
    assert found.keys() == merged.keys()
    for name, weight in found.items():
        whole = torch.cat([chunk.effective for chunk in weight.chunks()])
        torch.testing.assert_close(whole, merged[name].movedim(weight.input_axis, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 70, 1 << 22])
def test_weights_in_effect_are_those_that_peft_merges(adapted, monkeypatch, chunk):
    monkeypatch.setattr(effective, "CHUNK", chunk)
    check_against(effective_weights(adapted.model, adapted.groups), merged_weights(adapted.model))


def tiny_gpt2(**options):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    adapters = LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.1,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        **options,
    )
    return get_peft_model(GPT2LMHeadModel(config), adapters).eval()


def test_transposed_weights_and_dropout_are_followed():
    own = traced(randomized(tiny_gpt2()))
    found = effective_weights(own.model, own.groups)
    assert {weight.input_axis for weight in found.values()} == {0}
    check_against(found, merged_weights(own.model))


def test_two_adapters_on_one_weight_add_up():
    from peft import LoraConfig

    model = attach_adapters(tiny_llama(), rank=2, alpha=3)
    model.add_adapter("second", LoraConfig(r=5, lora_alpha=4, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    own = traced(randomized(model))
    found = effective_weights(own.model, own.groups)
    assert {len(weight.terms) for weight in found.values()} == {2}
    check_against(found, merged_weights(own.model, ["default", "second"]))


def test_updates_that_are_more_than_low_rank_are_not_taken_for_it():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", use_dora=True)
    own = traced(get_peft_model(tiny_llama(), config).eval())
    assert low_rank_updates(own.groups.graph) == {}


def test_a_model_without_adapters_has_none(llama):
    assert low_rank_updates(llama.groups.graph) == {}


class Mixed(nn.Module):
    """Sums of products in several forms, of which some are low-rank updates."""

    def __init__(self):
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(6, size) for size in (8, 8, 8, 1, 8, 8))
        self.down = nn.ModuleList(nn.Linear(6, 2, bias=False) for _ in self.base)
        self.up = nn.ModuleList(nn.Linear(2, 8, bias=False) for _ in self.base)

    def forward(self, x):
        low = [up(down(x)) for up, down in zip(self.up, self.down, strict=True)]
        return (
            low[0] * 3 / 4 + self.base[0](x),
            torch.add(self.base[1](x), low[1], alpha=5),
            self.base[2](x.relu()) + low[2],  # of something else
            self.base[3](x) + low[3],  # repeated for each output
            self.base[4](x) + low[4].tanh(),  # not linear
            torch.add(low[5], self.base[5](x), alpha=2),  # twice the weight
        )


def test_factors_and_what_is_no_update():
    graph = trace(Mixed().eval(), {"x": torch.randn(3, 7, 6)})
    found = low_rank_updates(graph)
    assert {name: [term.scaling for term in update.factors] for name, update in found.items()} == {
        "base.0.weight": [0.75],
        "base.1.weight": [5.0],
    }
    assert found["base.1.weight"].factors[0] == Factors("down.1.weight", "up.1.weight", 5.0)
