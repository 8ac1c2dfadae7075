from __future__ import annotations

import pytest
import torch
from lhspg_bench import INPUTS, Net, adapted_llama, llama_groups, net_groups, width_of
from tiny_models import tiny_llama
from torch import nn

import graphprune as gp
from graphprune.errors import BudgetError, NothingPrunableError, RecipeError, TrainingError


def test_they_are_parameter_groups_as_any_optimizer_takes_them():
    model = adapted_llama()
    params = gp.param_groups(model, llama_groups())
    (group,) = torch.optim.SGD(params, lr=0.1).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def removed_share(model, groups, units) -> float:
    """Cut the last units out of a copy, and count the base's parameters."""
    plan = gp.Plan(
        {name: range(groups[name].size - count, groups[name].size) for name, count in units.items()}
    )
    small = gp.shrink(model, groups, plan)
    count = [
        sum(p.numel() for name, p in one.named_parameters() if "lora_" not in name) for one in (model, small)
    ]
    return 1 - count[1] / count[0]


@pytest.mark.parametrize("remove", [0.1, 0.25, 0.4])
def test_the_share_asked_for_is_that_of_the_base_and_layers_give_alike(remove):
    model, groups = adapted_llama(), llama_groups()
    units = gp.param_groups(model, groups).units(remove, width_multiple={})
    one_channel = 2 * 3 * 32 / 22_048  # two layers; gate, up and down
    assert removed_share(model, groups, units) == pytest.approx(remove, abs=one_channel)
    assert {units[name] for name in units if groups[name].kind == "ffn"} == {
        next(units[name] for name in units if groups[name].kind == "ffn")
    }


@pytest.mark.parametrize("remove", [0.3, 0.6])
def test_no_family_of_groups_starves_another(remove):
    """Whatever a unit weighs: here 40 units of 12 parameters or more, and 10 of 48."""
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 10), nn.ReLU(), nn.Linear(10, 8))
    groups = gp.node_groups(gp.trace(model, torch.randn(3, 8)))
    units = gp.param_groups(model, groups, kinds=["ffn"]).units(remove, width_multiple={})
    wide, narrow = (count / groups[name].size for name, count in units.items())
    assert wide == pytest.approx(narrow, abs=0.15)  # a unit of the narrow one is a tenth


def test_without_a_say_widths_stay_aligned():
    units = gp.param_groups(adapted_llama(), llama_groups()).units(0.2)
    sizes = {name: llama_groups()[name].size for name in units}
    assert all((sizes[name] - count) % 2 == 0 for name, count in units.items() if sizes[name] == 48)
    assert any(sizes[name] == 48 for name in units)


def test_kinds_may_be_chosen():
    params = gp.param_groups(adapted_llama(), llama_groups(), kinds=["ffn"])
    assert {group.kind for group in params.prunable} == {"ffn"}
    assert {llama_groups()[name].kind for name in params.units(0.2)} == {"ffn"}


def test_where_nothing_is_frozen_all_parameters_count():
    model = Net()
    params = gp.param_groups(model, net_groups(), kinds=["ffn"])
    assert params.counted == dict(model.named_parameters()).keys()
    (count,) = params.units(0.5, width_multiple={}).values()
    per_unit, total = 6 + 1 + 3, sum(p.numel() for p in model.parameters())
    assert count * per_unit / total == pytest.approx(0.5, abs=per_unit / total)


def test_what_counts_may_be_said():
    only_up = gp.param_groups(Net(), net_groups(), kinds=["ffn"], counted=["up.weight"])
    assert only_up.units(0.5, width_multiple={}) == {width_of(net_groups()): 12}


def test_a_plain_network_is_pruned_while_it_trains():
    model = Net()
    optimizer = gp.LHSPG(
        gp.param_groups(model, net_groups(), kinds=["ffn"]),
        remove=0.4,
        warmup_steps=2,
        periods=2,
        period_steps=3,
    )
    for _ in range(optimizer.schedule_steps):
        optimizer.zero_grad()
        (model(**INPUTS) - 1).square().mean().backward()
        optimizer.step()
    expected = model(**INPUTS)
    optimizer.close()
    small = gp.shrink(model, net_groups(), optimizer.plan)
    torch.testing.assert_close(small(**INPUTS), expected)
    assert small.up.out_features < 24


@pytest.mark.parametrize("remove", [-0.1, 1.0, 0.99])
def test_a_share_that_cannot_be_removed_is_refused(remove):
    with pytest.raises(BudgetError):
        gp.param_groups(adapted_llama(), llama_groups()).units(remove)


def test_one_kind_may_be_a_string():
    model = adapted_llama()
    assert {group.kind for group in gp.param_groups(model, llama_groups(), kinds="ffn").prunable} == {"ffn"}


@pytest.mark.parametrize("multiple", [{"fnn": 16}, {"ffn": 0}])
def test_a_multiple_for_no_kind_here_is_refused(multiple):
    with pytest.raises(BudgetError, match=r"width_multiple gives .*\n.*attention_heads, ffn"):
        gp.param_groups(adapted_llama(), llama_groups()).units(0.2, multiple)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="no group is of kind 'expert'"):
        gp.param_groups(adapted_llama(), llama_groups(), kinds=["expert"])
    with pytest.raises(NothingPrunableError):
        gp.param_groups(adapted_llama(), llama_groups(), kinds=["vocabulary"])
    with pytest.raises(TrainingError, match="which the model does not have"):
        gp.param_groups(tiny_llama(), llama_groups())
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        gp.param_groups(adapted_llama().requires_grad_(False), llama_groups())
