from __future__ import annotations

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama, traced
from torch import nn

import graphprune as gp
from graphprune.errors import RecipeError, TrainingError
from graphprune.prune.training import Objective, logits_of
from graphprune.saliency.gates import Gates
from graphprune.saliency.norms import normed_weights
from graphprune.saliency.registry import Evidence, saliency_named
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan

IDS = torch.arange(24).reshape(2, 12) % 60 + 3


@pytest.fixture
def own():
    """A tiny Llama of this test's own."""
    return traced(tiny_llama(seed=3))


def names_of(traced_model, *kinds):
    return [name for kind in kinds for name in traced_model.of_kind(kind)]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_open_gates_change_no_bit_and_close_leaves_no_trace(own):
    before = logits(own.model)
    gates = Gates(own.model, own.groups, names_of(own, "ffn", "attention_heads"))
    assert torch.equal(logits(own.model), before)
    gates.close()
    assert not any(module._forward_pre_hooks for module in own.model.modules())


@pytest.mark.parametrize("kind", ["ffn", "attention_heads", "query_heads"])
def test_a_closed_gate_is_the_unit_removed(own, kind):
    names = names_of(own, kind)
    gates = Gates(own.model, own.groups, names)
    with torch.no_grad():
        for value in gates.values.values():
            value[1] = 0
    gated = logits(own.model)
    assert gates.redundant() == {name: [1] for name in names}
    with gates.opened():
        assert not torch.allclose(logits(own.model), gated, atol=1e-3)
    gates.close()
    small = shrink(own.model, own.groups, Plan({name: [1] for name in names}), own.inputs)
    torch.testing.assert_close(logits(small), gated, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_finite_differences(own):
    own.model.double()
    name = own.of_kind("ffn")[1]
    gates = Gates(own.model, own.groups, [name])
    gates.values[name] = nn.Parameter(gates.values[name].double())
    loss = Objective(logits_of(own.model), None, 0.0, False)
    loss(IDS).backward()
    gradient = gates.gradients()[name]
    for unit in (0, 7):
        values = []
        for shift in (0.05, -0.05):  # large: norms compute in float32
            with torch.no_grad():
                gates.values[name][unit] += shift
                values.append(float(loss(IDS)))
                gates.values[name][unit] -= shift
        assert float(gradient[unit]) == pytest.approx((values[0] - values[1]) / 0.1, rel=3e-2)


def test_two_groups_on_one_axis_multiply(own):
    names = [own.of_kind("attention_heads")[0], own.of_kind("query_heads")[0]]
    gates = Gates(own.model, own.groups, names)
    with torch.no_grad():
        gates.values[names[0]][0] = 0.5
        gates.values[names[1]][0] = 0.5
    seen = {}
    projection = own.model.model.layers[0].self_attn.o_proj
    projection.register_forward_hook(lambda module, args, out: seen.update(after=args[0]))
    logits(own.model)
    gated = seen["after"]
    with gates.opened():
        logits(own.model)
    ratio = (gated / seen["after"]).reshape(-1, 2, 2, 8)[0, :, :, 0]  # heads × repetition
    torch.testing.assert_close(ratio, torch.tensor([[0.25, 0.5], [0.5, 1.0]]), rtol=1e-4, atol=1e-4)


def test_a_group_that_nothing_consumes_cannot_be_gated(own):
    with pytest.raises(TrainingError, match="no operator consumes"):
        Gates(own.model, own.groups, own.of_kind("vocabulary"))


def evidence(own, gates, objective=None):
    loss = objective or Objective(logits_of(own.model), None, 0.0, False)
    return Evidence(own.model, own.groups, gates, IDS.split(1), loss)


@pytest.mark.parametrize("name", ["fisher", "taylor", "magnitude"])
def test_scores_are_finite_one_for_each_unit_and_not_negative(own, name):
    gates = Gates(own.model, own.groups, names_of(own, "ffn", "attention_heads"))
    scores = saliency_named(name)(evidence(own, gates))
    assert set(scores) == set(gates.values)
    for group, score in scores.items():
        assert score.shape == (own.groups[group].size,)
        assert bool(score.isfinite().all())
        assert bool((score >= 0).all())
        assert float(score.std()) > 0


def test_fisher_is_the_mean_of_squared_gradients(own):
    """Against autograd on each sequence by itself."""
    name = own.of_kind("ffn")[0]
    gates = Gates(own.model, own.groups, [name])
    scores = saliency_named("fisher")(evidence(own, gates))[name]
    squares = []
    for ids in IDS.split(1):
        out = own.model(input_ids=ids, labels=ids, use_cache=False).loss
        squares.append(torch.autograd.grad(out, gates.values[name])[0].square())
    torch.testing.assert_close(scores, torch.stack(squares).mean(0), rtol=1e-4, atol=1e-12)


def test_magnitude_scales_with_the_weights_of_a_unit(own):
    name = own.of_kind("ffn")[0]
    gates = Gates(own.model, own.groups, [name])
    before = saliency_named("magnitude")(evidence(own, gates))[name]
    with torch.no_grad():
        mlp = own.model.model.layers[0].mlp
        mlp.gate_proj.weight[4] *= 3
        mlp.up_proj.weight[4] *= 3
        mlp.down_proj.weight[:, 4] *= 3
    after = saliency_named("magnitude")(evidence(own, gates))[name]
    ratio = after / before
    assert float(ratio[4] / ratio[5]) == pytest.approx(3, rel=1e-4)


def test_an_unknown_saliency_is_named():
    with pytest.raises(RecipeError, match="did you mean 'fisher'"):
        saliency_named("fischer")


def test_no_calibration_text_is_an_error(own):
    gates = Gates(own.model, own.groups, own.of_kind("ffn"))
    empty = Evidence(own.model, own.groups, gates, [], Objective(logits_of(own.model), None, 0.0, False))
    with pytest.raises(TrainingError, match="calibration set is empty"):
        saliency_named("fisher")(empty)


def test_gates_on_their_way_to_zero_have_the_gradients_of_a_product(own):
    name = own.of_kind("ffn")[1]
    gates = Gates(own.model, own.groups, [name])
    down = own.model.get_submodule(gates.consumers[0].parameter.rpartition(".")[0])
    with torch.no_grad():
        gates.values[name].copy_(torch.linspace(0, 1, len(gates.values[name])))
    seen = {}

    def keep(module, arguments):
        seen["gated"] = arguments[0]
        arguments[0].retain_grad()

    loss = Objective(logits_of(own.model), None, 0.0, False)
    with down.register_forward_pre_hook(keep):  # behind the gates' own hook
        loss(IDS).backward()
    gated, gradient = seen["gated"].detach(), seen["gated"].grad
    expected = (gradient * gated).flatten(0, -2).sum(0)[1:] / gates.values[name].detach()[1:]
    found = gates.gradients()[name]
    torch.testing.assert_close(found[1:], expected, atol=1e-7, rtol=1e-4)
    assert found[0] == 0  # what a gate of zero takes away is not kept


def test_what_lies_before_a_gate_gets_its_share_of_the_gradient(own):
    name = own.of_kind("ffn")[1]
    gates = Gates(own.model, own.groups, [name])
    down = own.model.get_submodule(gates.consumers[0].parameter.rpartition(".")[0])
    with torch.no_grad():
        gates.values[name].copy_(torch.linspace(0, 1, len(gates.values[name])))
    seen = []

    def keep(module, arguments):
        seen.append(arguments[0])
        arguments[0].retain_grad()

    loss = Objective(logits_of(own.model), None, 0.0, False)
    with down.register_forward_pre_hook(keep, prepend=True), down.register_forward_pre_hook(keep):
        loss(IDS).backward()
    source, gated = seen
    torch.testing.assert_close(source.grad, gated.grad * gates.values[name].detach())


def test_activations_in_front_of_gates_are_not_kept(own):
    name = own.of_kind("ffn")[1]
    gates = Gates(own.model, own.groups, [name])
    down = own.model.get_submodule(gates.consumers[0].parameter.rpartition(".")[0])
    sources = []

    def note(module, arguments):
        sources.append(weakref.ref(arguments[0]))

    with down.register_forward_pre_hook(note, prepend=True):
        loss = Objective(logits_of(own.model), None, 0.0, False)(IDS)
    assert sources[0]() is None
    loss.backward()
    gates.close()


class WeightNormed(nn.Module):
    """Two layers; the second one's weight is divided by a norm along what the gates would close."""

    def __init__(self, axis):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.weight, self.axis = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 8)), axis

    def forward(self, x):
        weight = self.weight / self.weight.norm(dim=self.axis, keepdim=True)
        return nn.functional.linear(torch.relu(self.up(x)), weight)


def test_a_weight_that_is_rescaled_by_its_own_norm_cannot_be_gated():
    """A cut changes the norm, and a closed gate does not."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["down_proj"], use_dora=True))
    groups = traced(model).groups
    channels = [name for name, group in groups.items() if group.kind == "ffn"]
    heads = [name for name, group in groups.items() if group.kind == "attention_heads"]
    with pytest.raises(
        TrainingError, match=r"down_proj.* is rescaled by a norm of itself \(aten.linalg_norm"
    ):
        Gates(model, groups, channels)
    Gates(model, groups, heads).close()
    normed = WeightNormed(axis=1)
    assert normed_weights(gp.trace(normed, {"x": torch.randn(5, 6)})) == {
        "weight": "aten.linalg_vector_norm.default"
    }
    assert normed_weights(traced(tiny_llama()).groups.graph) == {}
