"""Gates where a module works out itself what its weight reads, where one is tied, where products are spelled out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama, traced
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import graphprune as gp
from graphprune.errors import TrainingError
from graphprune.prune.training import Objective, logits_of
from graphprune.saliency.gates import Gates
from graphprune.saliency.registry import Evidence, saliency_named
from graphprune.shrink.gated import is_gated

IDS = torch.arange(24).reshape(2, 12) % 60 + 3
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return spread(MixtralForCausalLM(MixtralConfig(**SIZES)))


def gpt_oss() -> nn.Module:
    """Its experts are stored (in, out), with biases."""
    torch.manual_seed(0)
    return spread(GptOssForCausalLM(GptOssConfig(**{**SIZES, "sliding_window": 16}, head_dim=8)))


def spread(model: nn.Module) -> nn.Module:
    """Make experts and heads count: at their own initialization they hardly move the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_a_closed_gate_is_a_channel_of_all_experts_removed(build):
    own = traced(build())
    names = own.of_kind("ffn")
    before = logits(own.model)
    held = dict(own.model.named_parameters())
    gates = Gates(own.model, own.groups, names)
    assert is_gated(own.model)
    torch.testing.assert_close(logits(own.model), before, atol=1e-6, rtol=0)
    units = [1, 3, 6, 20]  # what is left has a width that grouped products take
    with torch.no_grad():
        for value in gates.values.values():
            value[units] = 0
    gated = logits(own.model)
    assert float((gated - before).abs().max()) > 0.1
    with gates.opened():
        assert torch.equal(logits(own.model), before)
    gates.close()
    assert torch.equal(logits(own.model), before)
    assert {name: id(parameter) for name, parameter in own.model.named_parameters()} == {
        name: id(parameter) for name, parameter in held.items()
    }
    small = gp.shrink(own.model, own.groups, gp.Plan(dict.fromkeys(names, units)), own.inputs)
    torch.testing.assert_close(logits(small), gated, atol=1e-5, rtol=1e-4)


def test_gradients_of_gates_on_experts_are_those_of_finite_differences():
    own = traced(mixtral())
    name = own.of_kind("ffn")[1]
    gates = Gates(own.model, own.groups, [name])
    loss = Objective(logits_of(own.model), None, 0.0, False)
    loss(IDS).backward()
    gradient = gates.gradients()[name]
    unit = int(gradient.abs().argmax())
    values = []
    for shift in (0.02, -0.02):
        with torch.no_grad():
            gates.values[name][unit] += shift
            values.append(float(loss(IDS)))
            gates.values[name][unit] -= shift
    assert float(gradient[unit]) == pytest.approx((values[0] - values[1]) / 0.04, rel=2e-2)


def test_a_forward_that_fails_gives_the_weight_back():
    own = traced(mixtral())
    gates = Gates(own.model, own.groups, own.of_kind("ffn"))
    experts = own.model.model.layers[0].mlp.experts
    weight = experts.down_proj
    with pytest.raises(RuntimeError), torch.no_grad():
        experts(torch.zeros(3, 5), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    assert experts.down_proj is weight
    gates.close()


@pytest.mark.parametrize("name", ["wanda", "surgeon"])
def test_what_only_activations_tell_is_refused_for_experts(name):
    own = traced(mixtral())
    gates = Gates(own.model, own.groups, own.of_kind("ffn"))
    evidence = Evidence(
        own.model, own.groups, gates, IDS.split(1), Objective(logits_of(own.model), None, 0.0, False)
    )
    with pytest.raises(TrainingError, match=r"down_proj reads cannot be observed.*\n.*fisher"):
        saliency_named(name)(evidence)


class Tied(nn.Module):
    """A table that is looked up, and in the head multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.table(ids))))


def test_a_tied_head_is_gated_where_it_multiplies_not_where_rows_are_looked_up():
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(6).view(2, 3)
    groups = gp.node_groups(gp.trace(model, {"ids": ids}))
    (name,) = [name for name, group in groups.items() if group.prunable and group.size == 8]
    gates = Gates(model, groups, [name])
    assert {consumer.module for consumer in gates.consumers} == {"mix", "head"}
    with torch.no_grad():
        gates.values[name][[2, 5]] = 0
        gated = model(ids)
        gates.close()
        small = gp.shrink(model, groups, {name: [2, 5]}, {"ids": ids})
        torch.testing.assert_close(small(ids), gated, atol=1e-6, rtol=1e-5)


def test_units_that_a_norm_counts_are_not_gated():
    own = traced(tiny_llama(seed=6))
    with pytest.raises(TrainingError, match="a norm counts the units"):
        Gates(own.model, own.groups, own.of_kind("hidden"))


class Functional(nn.Module):
    """Multiplies by a child's weight without calling the child, and one of its own within its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.out = nn.Parameter(torch.randn(10, 3))
        self.middle = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x)) @ self.down.weight.T
        return torch.relu(self.middle(hidden)) @ self.out


def test_weights_that_no_module_of_their_own_reads_are_gated():
    torch.manual_seed(0)
    model, x = Functional(), torch.randn(5, 8)
    groups = gp.node_groups(gp.trace(model, {"x": x}))
    names = [name for name, group in groups.items() if group.prunable and group.size in (10, 12)]
    assert len(names) == 2
    gates = Gates(model, groups, names)
    with torch.no_grad():
        for value in gates.values.values():
            value[[0, 4]] = 0
        gated = model(x)
        gates.close()
        small = gp.shrink(model, groups, gp.Plan({name: [0, 4] for name in names}), {"x": x})
        torch.testing.assert_close(small(x), gated, atol=1e-5, rtol=1e-5)
        assert float((model(x) - gated).abs().max()) > 1e-2


class LookedUp(nn.Module):
    """Looks rows up, and multiplies by the same table within its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        return (hidden + torch.relu(self.mix(hidden))) @ self.table.weight.T


def test_a_table_that_is_looked_up_too_is_not_scaled_as_a_whole():
    ids = torch.arange(6).view(2, 3)
    model = LookedUp()
    groups = gp.node_groups(gp.trace(model, {"ids": ids}))
    (name,) = [name for name, group in groups.items() if group.size == 8 and group.prunable]
    with pytest.raises(TrainingError, match=r"table.weight is multiplied with 0 activations"):
        Gates(model, groups, [name])


class Parts(nn.Module):
    """A module within another, of the forward that a test wants."""

    def __init__(self, forward, **weights: Tensor) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))
        self.computes = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.computes(self, x)


class Around(nn.Module):
    """Calls a part with twelve channels, of which the part's weight is to read all."""

    def __init__(self, part: nn.Module, call) -> None:
        super().__init__()
        self.up, self.part, self.call = nn.Linear(8, 12), part, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.part, torch.relu(self.up(x)), x)


def flattened(part, x):
    return nn.functional.linear(x.flatten(-2), part.weight)


def twice(part, x):
    return nn.functional.linear(x, part.first) + nn.functional.linear(x, part.second)


class Second(Parts):
    """Reads its second input."""

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + nn.functional.linear(x, self.weight)


PARTS = {
    "input of another shape": (
        lambda: Parts(flattened, weight=torch.randn(8, 12)),
        lambda part, hidden, x: part(hidden.view(-1, 3, 4)),
    ),
    "two weights that read one input": (
        lambda: Parts(twice, first=torch.randn(8, 12), second=torch.randn(8, 12)),
        lambda part, hidden, x: part(hidden),
    ),
    "the second input": (
        lambda: Second(None, weight=torch.randn(8, 12)),
        lambda part, hidden, x: part(x, hidden),
    ),
    "one layer, called twice": (
        lambda: nn.Linear(12, 8),
        lambda part, hidden, x: part(hidden) + torch.relu(part(2 * hidden)),
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_gate_scales_what_its_unit_contributes_however_a_weight_is_reached(kind):
    torch.manual_seed(0)
    build, call = PARTS[kind]
    model, x = Around(build(), call), torch.randn(5, 8)
    groups = gp.node_groups(gp.trace(model, {"x": x}))
    names = [
        name
        for name, group in groups.items()
        if any(m.parameter == "up.weight" and m.axis == 0 for m in group.members)
    ]
    gates = Gates(model, groups, names)
    with torch.no_grad():
        for name in names:
            gates.values[name][1] = 0.5
        gated = model(x)
        gates.close()
        assert not torch.allclose(model(x), gated, atol=1e-3)
        for name in names:
            for member in groups[name].consumers:
                weight = model.get_parameter(member.parameter)
                units = torch.from_numpy(groups[name].indices(member, 1))
                weight.index_copy_(member.axis, units, weight.index_select(member.axis, units) * 0.5)
        torch.testing.assert_close(model(x), gated, atol=1e-5, rtol=1e-5)


class Shared(nn.Module):
    """Two layers of one weight, each with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other = nn.Linear(8, 12), nn.Linear(8, 12)
        self.first, self.second = nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.relu(self.up(x))) + torch.tanh(self.second(torch.relu(self.other(x))))


def test_a_weight_that_two_modules_multiply_by_is_refused():
    model, x = Shared(), torch.randn(5, 8)
    groups = gp.node_groups(gp.trace(model, {"x": x}))
    (name,) = [name for name, group in groups.items() if group.size == 12]
    with pytest.raises(TrainingError, match=r"multiplied with 2 activations \(in 'first', 'second'\)"):
        Gates(model, groups, [name])


class Again(nn.Module):
    """Multiplies two activations by one matrix within one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other, self.weight = (
            nn.Linear(8, 12),
            nn.Linear(8, 12),
            nn.Parameter(torch.randn(12, 8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) @ self.weight + torch.tanh(torch.relu(self.other(x)) @ self.weight)


def test_a_weight_that_one_module_multiplies_by_twice_is_refused():
    model, x = Again(), torch.randn(5, 8)
    groups = gp.node_groups(gp.trace(model, {"x": x}))
    (name,) = [name for name, group in groups.items() if group.size == 12]
    with pytest.raises(TrainingError, match=r"weight is multiplied with 2 activations \(in ''\)"):
        Gates(model, groups, [name])


class Queries(nn.Module):
    """Learned queries go through a layer before they meet an activation: the layer's input is no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.queries)))[0]


def test_a_weight_that_meets_no_activation_is_refused():
    model, x = Queries(), torch.randn(5, 8)
    groups = gp.node_groups(gp.trace(model, {"x": x}))
    names = [
        name
        for name, group in groups.items()
        if any(m.parameter == "up.weight" and m.axis == 0 for m in group.members)
    ]
    with pytest.raises(TrainingError, match=r"weight is multiplied with 0 activations"):
        Gates(model, groups, names)
