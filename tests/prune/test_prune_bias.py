"""Bias compensation: what removed units do on average stays."""

from __future__ import annotations

import pytest
import torch
from lhspg_bench import INPUTS, Net, adapted_net, width_of
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama, traced
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import ShrinkError, TrainingError
from graphprune.prune.repair.activations import Calibration
from graphprune.prune.repair.bias import Bias
from graphprune.saliency.gates import Gates
from graphprune.shrink.plan import Plan
from graphprune.source.adapters import attach_adapters

X = INPUTS["x"]
IDS = torch.arange(96).reshape(8, 12) % 60 + 3


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def shut(gates: Gates, units: list[int], repair: Bias) -> Plan:
    with torch.no_grad():
        for value in gates.values.values():
            value[units] = 0
    repair.update(lambda name: gates.values[name] == 0)
    return Plan(gates.redundant())


def test_units_that_are_constant_go_without_a_trace():
    """Exactly: what goes is a constant, adapters' share included, and a bias is one too."""
    model = randomized(adapted_net())
    units = [1, 7, 20]
    up = model.base_model.model.up
    with torch.no_grad():
        for weight in (up.base_layer.weight, up.lora_B["default"].weight):
            weight[units] = 0
        up.base_layer.bias[units] = torch.tensor([0.5, 1.0, 2.0])
        groups = gp.node_groups(gp.trace(model, INPUTS))
        dense = model(X)
        gates = Gates(model, groups, [width_of(groups)])
        repair = Bias(model, groups, gates, Calibration.of_windows(X, 2, model))
        for value in gates.values.values():
            value[units] = 0
        assert not torch.allclose(model(X), dense, atol=1e-2)
        plan = shut(gates, units, repair)
        torch.testing.assert_close(model(X), dense, atol=1e-6, rtol=0)
        gates.close()
        before = model.base_model.model.down.base_layer.bias.clone()
        small = repair.cut(plan, lambda: gp.shrink(model, groups, plan, INPUTS))
        torch.testing.assert_close(small(X), dense, atol=1e-6, rtol=0)
        assert torch.equal(model.base_model.model.down.base_layer.bias, before)
        assert small.base_model.model.down.base_layer.in_features == 21


@pytest.mark.parametrize("kind", ["ffn", "attention_heads", "query_heads"])
def test_new_biases_are_the_removed_weights_times_the_means_of_what_they_read(kind):
    """Against W_r E[x_r] in float64, x recorded by the test's own hooks, W as PEFT merges it."""
    own = traced(randomized(attach_adapters(tiny_llama(seed=6), rank=2, alpha=4)))
    names = own.of_kind(kind)
    layers = own.model.base_model.model.model.layers
    readers = [layer.mlp.down_proj if kind == "ffn" else layer.self_attn.o_proj for layer in layers]
    seen: list[list[Tensor]] = [[] for _ in readers]
    hooks = [
        reader.register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(args[0].flatten(0, 1).double())
        )
        for reader, rows in zip(readers, seen)
    ]
    with torch.no_grad():
        own.model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    gates = Gates(own.model, own.groups, names)
    repair = Bias(
        own.model, own.groups, gates, Calibration.of_windows(IDS, 3, lambda ids: own.model(input_ids=ids))
    )
    plan = shut(gates, [0], repair)
    with torch.no_grad():
        repaired = own.model(input_ids=IDS).logits
    gates.close()
    small = repair.cut(plan, lambda: gp.shrink(own.model, own.groups, plan, own.inputs))
    for name, reader, rows in zip(names, readers, seen):
        (member,) = (m for m in own.groups[name].consumers if "lora" not in m.parameter)
        columns = own.groups[name].indices(member, 0)
        merged = (reader.base_layer.weight + reader.get_delta_weight("default")).double()
        expected = merged[:, columns] @ torch.cat(rows).mean(0)[columns]
        layer = small.get_submodule(member.parameter.rpartition(".")[0])
        torch.testing.assert_close(layer.bias.double(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=IDS).logits, repaired, atol=1e-4, rtol=1e-4)
        merged = small.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, repaired, atol=1e-4, rtol=1e-4)


class Chain(nn.Module):
    """Two hidden widths, the second one without a bias: what the first loses reaches units that go too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 8, bias=False)
        self.third = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def test_a_layer_that_loses_outputs_too_gets_the_biases_of_those_that_stay():
    model = Chain()
    groups = gp.node_groups(gp.trace(model, INPUTS))
    names = [name for name, group in groups.items() if group.prunable]
    assert len(names) == 2
    gates = Gates(model, groups, names)
    repair = Bias(model, groups, gates, Calibration.of_windows(X, 5, model))
    plan = shut(gates, [0, 3], repair)
    with torch.no_grad():
        repaired = model(X)
        gates.close()
        small = repair.cut(plan, lambda: gp.shrink(model, groups, plan, INPUTS))
        assert small.second.bias.shape == (6,)
        torch.testing.assert_close(small(X), repaired, atol=1e-6, rtol=0)
        with pytest.raises(ShrinkError, match="second has no bias, and in the traced graph"):
            repair.cut(plan, lambda: gp.shrink(model, groups, plan, form="graph"))


def test_a_layer_without_a_place_for_a_bias_is_refused():
    class Bare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(24, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.up(x)) @ self.matrix

    model = Bare()
    groups = gp.node_groups(gp.trace(model, INPUTS))
    gates = Gates(model, groups, [width_of(groups)])
    with pytest.raises(TrainingError, match=r"matrix reads units .* no place for a bias"):
        Bias(model, groups, gates, Calibration.of_windows(X, 5, model))


def test_factors_of_adapters_need_no_place():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["down"]))
    groups = gp.node_groups(gp.trace(model, INPUTS))
    gates = Gates(model, groups, [width_of(groups)])
    assert len(gates.consumers) == 2
    Bias(model, groups, gates, Calibration.of_windows(X, 5, model))
