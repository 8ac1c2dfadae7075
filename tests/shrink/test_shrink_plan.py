"""A plan that does not fit says so, and a plan is one however it is given."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.coupling.groups import node_groups
from graphprune.errors import CouplingError, RecipeError, ShrinkError
from graphprune.shrink.model import shrink
from graphprune.shrink.optimizer import shrink_optimizer
from graphprune.shrink.plan import Plan


@pytest.mark.parametrize("units", [[1.5], 5, ["0"], [True, False], torch.tensor([True]), np.array([False])])
def test_units_are_whole_numbers(units):
    with pytest.raises(ShrinkError, match="give the numbers of the units"):
        Plan({"mlp": units})


@pytest.mark.parametrize("units", [[3, 1, 3], (1, 3), range(1, 4, 2), torch.tensor([3, 1]), np.array([1, 3])])
def test_numbers_are_taken_from_anything_that_holds_them(units):
    assert Plan({"mlp": units})["mlp"] == (1, 3)


def test_a_plan_is_saved_and_loaded_by_a_path_of_either_type(tmp_path):
    plan = Plan({"mlp": [1, 3]}, whole=True)
    plan.save(str(tmp_path / "a.json"), asked=0.2)
    plan.save(tmp_path / "b.json")
    assert Plan.load(tmp_path / "a.json") == plan == Plan.load(str(tmp_path / "b.json"))
    assert json.loads((tmp_path / "a.json").read_text())["asked"] == 0.2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Expecting"),
        ("[]", "is not a plan"),
        ('{"schema": "graphprune.plan/1", "removed": {"mlp": [0.5]}}', "cannot be interpreted as an integer"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content, problem):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=problem):
        Plan.load(str(path))


def test_a_plain_dict_is_a_plan(llama):
    (name, *_) = llama.of_kind("ffn")
    small = shrink(llama.model, llama.groups, {name: [0, 3]}, llama.inputs, form="module")
    assert small.model.layers[0].mlp.gate_proj.out_features == 46
    with pytest.raises(ShrinkError, match="a list is not a plan"):
        shrink(llama.model, llama.groups, [name], llama.inputs)


def test_all_of_what_a_norm_runs_over_must_not_go(llama):
    (name,) = llama.of_kind("hidden")
    with pytest.raises(ShrinkError, match="nothing is left to divide by"):
        shrink(llama.model, llama.groups, Plan({name: range(32)}, whole=True), llama.inputs)


def test_a_later_plan_counts_the_units_that_are_left(llama):
    (name, *_) = llama.of_kind("ffn")
    first = Plan({name: range(40)})
    assert first.then(Plan({name: [7]}), llama.groups)[name][-1] == 47
    with pytest.raises(ShrinkError, match=r"unit 8 of .*of which the earlier one leaves 8"):
        first.then(Plan({name: [8]}), llama.groups)
    with pytest.raises(ShrinkError, match="unit -1 of"):
        first.then(Plan({name: [-1, 3]}), llama.groups)


def test_another_model_is_recognised(llama, build_llama):
    (name, *_) = llama.of_kind("ffn")
    other = build_llama(attention_bias=True)
    other.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
    plan = Plan({name: [0]})
    wrong = r"of another model: they know 'model\.layers\.1\.mlp\.up_proj\.weight' with shape \(48, 32\).*\(40, 32\)"
    with pytest.raises(CouplingError, match=wrong):
        shrink(other, llama.groups, plan, llama.inputs)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(CouplingError, match=wrong):
        shrink_optimizer(optimizer, other, other, llama.groups, plan)
    with pytest.raises(CouplingError, match="no node group 'encoder:ffn'"):
        shrink(llama.model, llama.groups, Plan({"encoder:ffn": [0]}), llama.inputs)


def test_groups_say_what_they_are_asked_wrongly(llama):
    group = llama.groups[llama.of_kind("ffn")[0]]
    for unit in (48, 99, -1):
        with pytest.raises(CouplingError, match=f"has no unit {unit}"):
            group.indices(group.members[0], unit)
    with pytest.raises(CouplingError, match="off an operator graph, not off a LlamaForCausalLM"):
        node_groups(llama.model)
