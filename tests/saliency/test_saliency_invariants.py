"""What holds for every saliency."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import IDS, KINDS, score
from tiny_models import FFN, KV_HEADS
from torch import nn

from graphprune.errors import TrainingError
from graphprune.prune.scoring import unit_scores
from graphprune.recipe import Prune, Training
from graphprune.saliency.registry import registered_saliencies
from graphprune.source.text import Windows
from quant.blockwise import quantize
from quant.linear import QuantLinear

ALL = registered_saliencies()
JUDGING = tuple(name for name in ALL if name != "random")
OF_GATES = ("fisher", "taylor")


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()))


def test_all_are_registered():
    assert set(ALL) == {
        *("fisher", "taylor", "magnitude", "random", "cosine", "cosine_gradient", "wanda", "flap"),
        *("taylor_first", "taylor_second", "taylor_mix", "taylor_vector", "loraprune", "loraprune_released"),
        "surgeon",
    }


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_batches_does_not_matter(name, adapted):
    close(score(adapted, name, batches=IDS.flip(0).split(1)), score(adapted, name))


@pytest.mark.parametrize("name", ALL)
def test_scoring_leaves_no_trace(name, adapted):
    before = {key: value.clone() for key, value in adapted.model.state_dict().items()}
    score(adapted, name)
    assert all(torch.equal(value, before[key]) for key, value in adapted.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in adapted.model.modules())
    if name not in OF_GATES:
        adapted.model.zero_grad()
        score(adapted, name)
        assert all(parameter.grad is None for parameter in adapted.model.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_recipe_reaches_it(name, precision, adapted):
    settings = Prune(
        saliency=name, kinds=KINDS, training=Training(precision=precision), calibration_windows=2
    )
    scores = unit_scores(adapted.model, adapted.groups, settings, Windows(IDS, "text"), seed=3)
    assert {key: len(value) for key, value in scores.items()} == {
        **dict.fromkeys(adapted.of_kind("ffn"), FFN),
        **dict.fromkeys(adapted.of_kind("attention_heads"), KV_HEADS),
    }
    for value in scores.values():
        assert bool(value.isfinite().all())
        assert bool((value >= 0).all())
        assert float(value.std()) > 0


@pytest.mark.parametrize("name", JUDGING)
@given(channels=st.permutations(range(FFN)), heads=st.permutations(range(KV_HEADS)))
@settings(max_examples=3)
def test_scores_follow_units_that_are_renumbered(name, channels, heads, adapted):
    orders = {group: torch.tensor(channels) for group in adapted.of_kind("ffn")}
    orders.update({group: torch.tensor(heads) for group in adapted.of_kind("attention_heads")})
    renumbered = score(adapted, name, model=permuted(adapted, orders))
    close(renumbered, {group: value[orders[group]] for group, value in score(adapted, name).items()})


def permuted(traced, orders):
    """A copy of a model with the units of groups in another order."""
    model = copy.deepcopy(traced.model)
    selection = traced.groups.selection({name: order.numpy() for name, order in orders.items()})
    with torch.no_grad():
        for group in orders:
            for member in traced.groups[group].members:
                if member.role == "parameter":
                    weight = model.get_parameter(member.parameter)
                    layout = traced.groups.axes(member.parameter)[member.axis]
                    index = torch.from_numpy(traced.groups.keep(layout, selection))
                    weight.copy_(weight.index_select(member.axis, index))
    return model


@pytest.mark.parametrize("name", ALL)
def test_a_quantized_base_scores_as_the_numbers_that_it_stands_for(name, adapted):
    packed, plain = copy.deepcopy(adapted.model), copy.deepcopy(adapted.model)
    for path, module in adapted.model.named_modules():
        if path.endswith("base_layer"):
            codes = quantize(module.weight.detach(), "nf4", 16)
            replace(packed, path, QuantLinear(codes))
            plain.get_submodule(path).weight.data = codes.dequantize()
    close(score(adapted, name, model=packed), score(adapted, name, model=plain))


class Opaque(nn.Module):
    """A linear layer that holds its weight as codes that nobody else can read."""

    def __init__(self, numbers, weight):
        super().__init__()
        self.numbers = numbers.detach()
        if weight is not None:
            self.register_buffer("weight", weight)

    def forward(self, x):
        return x @ self.numbers.T


@pytest.mark.parametrize("held", [None, torch.zeros(768, 1, dtype=torch.uint8)])
@pytest.mark.parametrize("name", ALL)
def test_weights_that_cannot_be_read_are_refused_by_those_that_look_at_them(name, held, adapted):
    model = copy.deepcopy(adapted.model)
    path = "base_model.model.model.layers.0.mlp.down_proj.base_layer"
    replace(model, path, Opaque(model.get_submodule(path).weight, held))
    if name in (*OF_GATES, "random"):
        assert all(bool(value.isfinite().all()) for value in score(adapted, name, model=model).values())
        return
    with pytest.raises(TrainingError, match=r"down_proj\.base_layer\.weight is held as .* 32 × 48 numbers"):
        score(adapted, name, model=model)


class Dequantizable(Opaque):
    """A linear layer in the form of HQQ, which PEFT can dequantize."""

    def __init__(self, numbers):
        super().__init__(numbers, None)
        self.W_q = torch.zeros(1, dtype=torch.uint8)

    def dequantize(self):
        return self.numbers


def test_whatever_peft_can_dequantize_is_read(adapted):
    model = copy.deepcopy(adapted.model)
    path = "base_model.model.model.layers.0.mlp.down_proj.base_layer"
    replace(model, path, Dequantizable(model.get_submodule(path).weight))
    close(score(adapted, "wanda", model=model), score(adapted, "wanda"))


def replace(model, path, module):
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@pytest.mark.parametrize("name", ["loraprune", "wanda"])
def test_a_loss_that_is_not_finite_stops_it(name, adapted):
    with pytest.raises(TrainingError, match="the loss is nan before any training"):
        score(adapted, name, scale=float("nan"))


def test_random_depends_on_the_seed_and_the_group_alone(adapted):
    scores = score(adapted, "random")
    for kind in KINDS:
        for group, value in score(adapted, "random", kinds=(kind,), batches=[]).items():
            assert torch.equal(value, scores[group])
    other = score(adapted, "random", seed=1)
    first, second = adapted.of_kind("ffn")
    assert not torch.equal(other[first], scores[first])
    assert not torch.equal(scores[first], scores[second])
    assert all(bool(((value >= 0) & (value < 1)).all()) for value in scores.values())


def test_the_seed_of_the_run_reaches_random(adapted):
    settings = Prune(saliency="random", kinds=KINDS)
    first, second = (
        unit_scores(adapted.model, adapted.groups, settings, Windows(IDS, "text"), seed=seed)
        for seed in (1, 2)
    )
    close(first, score(adapted, "random", seed=1))
    assert not any(torch.equal(first[group], second[group]) for group in adapted.of_kind("ffn"))
