"""Saliencies from activations, against all activations kept and the formulas in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from scoring import BATCHES, IDS, score
from tiny_models import FFN, HEADS, KV_HEADS, LAYERS

from graphprune.errors import TrainingError
from graphprune.prune.training import Objective, logits_of
from graphprune.saliency.activations import InputMoments
from graphprune.saliency.gates import Gates
from graphprune.saliency.registry import Evidence, saliency_named

SCALING = 2.0
QUERIES = HEADS // KV_HEADS * 8


@pytest.fixture(scope="module")
def kept(adapted):
    """What every consumer reads, (tokens, indices), and its weight in effect, by kind and layer."""
    model = copy.deepcopy(adapted.model)
    inputs, weights = {}, {}
    for index, layer in enumerate(model.base_model.model.model.layers):
        for kind, linear in (("ffn", layer.mlp.down_proj), ("attention_heads", layer.self_attn.o_proj)):
            linear.base_layer.register_forward_pre_hook(
                lambda module, args, place=(kind, index): inputs.setdefault(place, []).append(args[0])
            )
            update = linear.lora_B["default"].weight @ linear.lora_A["default"].weight
            weights[kind, index] = (linear.base_layer.weight + SCALING * update).detach().double()
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=ids[None], use_cache=False)
    return {place: (torch.cat(inputs[place], 1)[0].double(), weights[place]) for place in weights}


def test_wanda_is_magnitude_times_the_norm_of_the_input(adapted, kept):
    scores = score(adapted, "wanda")
    for (kind, layer), (x, w) in kept.items():
        columns = (w.abs() * x.norm(dim=0)).sum(0)
        expected = columns if kind == "ffn" else columns.reshape(KV_HEADS, QUERIES).sum(1)
        found = scores[adapted.of_kind(kind)[layer]]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_flap_is_fluctuation_times_squared_norm_standardised(adapted, kept):
    scores = score(adapted, "flap")
    expected = {}
    for (kind, layer), (x, w) in kept.items():
        metric = x.var(dim=0) * w.square().sum(0)
        if kind == "attention_heads":
            metric = metric.square()
        standard = (metric - metric.mean()) / metric.std()
        if kind == "attention_heads":
            standard = standard.reshape(KV_HEADS, QUERIES).mean(1)
        expected[adapted.of_kind(kind)[layer]] = standard
    least = min(float(value.min()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(scores[name].double(), value - least, rtol=1e-4, atol=1e-5)
    assert min(float(value.min()) for value in scores.values()) == 0


@pytest.mark.parametrize("name", ["wanda", "flap"])
def test_they_need_no_adapters_and_no_gradient(name, llama):
    with torch.inference_mode():
        scores = score(llama, name)
    assert {len(value) for value in scores.values()} == {FFN, KV_HEADS}
    assert len(scores) == 2 * LAYERS


def test_a_constant_input_counts_for_wanda_and_not_for_flap(llama):
    """A channel that gives the same, large number for every token."""
    model = copy.deepcopy(llama.model)
    mlp = model.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([3]), 5.0))
    name = llama.of_kind("ffn")[0]
    assert int(score(llama, "wanda", model=model, kinds=("ffn",))[name].argmax()) == 3
    assert int(score(llama, "flap", model=model, kinds=("ffn",))[name].argmin()) == 3


def test_moments_of_parts_add_up_far_from_zero():
    tokens = 1e3 + torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    whole = InputMoments.of(tokens[:30]) + InputMoments.of(tokens[30:])
    exact = tokens.double()
    torch.testing.assert_close(whole.variance, exact.var(0, correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.norm, exact.norm(dim=0))


@pytest.mark.parametrize("name", ["wanda", "surgeon"])
def test_a_module_that_is_not_called_is_named(name, llama):
    model = copy.deepcopy(llama.model)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.up_proj(x) @ mlp.down_proj.weight.T
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\.down_proj\.weight reads cannot be observed"):
        score(llama, name, model=model, kinds=("ffn",))


def test_an_input_of_another_size_is_refused(llama):
    model = copy.deepcopy(llama.model)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0][..., :40],))
    with pytest.raises(TrainingError, match=r"an input of shape \(1, 12, 40\)"):
        score(llama, "wanda", model=model, kinds=("ffn",))


@pytest.mark.parametrize("name", ["wanda", "loraprune"])
def test_the_model_is_judged_as_its_gates_are(name, adapted):
    """A unit that is gone adds nothing to what its consumers read, and others are judged without it."""
    group, later = adapted.of_kind("ffn")
    gates = Gates(adapted.model, adapted.groups, [group, later])
    evidence = Evidence(
        adapted.model, adapted.groups, gates, BATCHES, Objective(logits_of(adapted.model), None, 0.0, False)
    )
    before = saliency_named(name)(evidence)
    with torch.no_grad():
        gates.values[group][3] = 0
    after = saliency_named(name)(evidence)
    gates.close()
    assert (float(after[group][3]) == 0) == (name == "wanda")
    assert not torch.allclose(before[later], after[later], rtol=1e-3)
