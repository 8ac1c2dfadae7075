from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import BudgetError, NothingPrunableError, RecipeError
from graphprune.prune.budget import targets, uniform_budget
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan


def scores_of(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(group.size, generator=generator) for name, group in groups.items()}


def budget_of(traced_model, remove, kinds=("ffn", "attention_heads"), scores=None, multiple=8):
    return uniform_budget(
        traced_model.groups,
        targets(traced_model.groups, kinds),
        scores or scores_of(traced_model.groups),
        remove=remove,
        width_multiple={"ffn": multiple},
        counted=set(dict(traced_model.model.named_parameters())),
    )


@settings(max_examples=30)
@given(st.floats(0.05, 0.4), st.integers(0, 5))
def test_the_budget_is_what_surgery_removes_within_one_step(llama, remove, seed):
    budget = budget_of(llama, remove, scores=scores_of(llama.groups, seed))
    total = sum(parameter.numel() for parameter in llama.model.parameters())
    assert budget.before == total
    step = 8 * 3 * 32 * 2 / total  # eight channels of every layer
    assert abs(budget.removed_share - remove) <= step
    plan = Plan({name: range(count) for name, count in budget.removed_units.items()})
    small = shrink(llama.model, llama.groups, plan, llama.inputs)
    assert sum(parameter.numel() for parameter in small.parameters()) == budget.after


def test_layers_are_uniform_and_widths_a_multiple(llama):
    budget = budget_of(llama, 0.2)
    by_kind = {}
    for name, count in budget.removed_units.items():
        by_kind.setdefault(llama.groups[name].kind, set()).add(count)
        if llama.groups[name].kind == "ffn":
            assert (llama.groups[name].size - count) % 8 == 0
    assert by_kind
    assert all(len(counts) == 1 for counts in by_kind.values())


def test_of_layouts_equally_near_the_one_with_less_saliency_goes(llama):
    """Worthless heads are taken before channels, and the other way round."""
    heads, channels = llama.of_kind("attention_heads"), llama.of_kind("ffn")
    for cheap, dear in ((heads, channels), (channels, heads)):
        scores = {
            name: torch.full((llama.groups[name].size,), 1e-9 if name in cheap else 1.0)
            for name in heads + channels
        }
        removed = budget_of(llama, 0.22, scores=scores).removed_units
        assert set(cheap) & set(removed)
        assert sum(removed.get(name, 0) for name in dear) <= sum(
            budget_of(llama, 0.22, scores={n: 1 - s for n, s in scores.items()}).removed_units.get(n, 0)
            for n in dear
        )


def test_a_share_out_of_reach_says_what_can_be_had(llama):
    with pytest.raises(BudgetError, match="the nearest is"):
        budget_of(llama, 0.9)


def test_a_width_multiple_that_no_group_can_keep(llama):
    with pytest.raises(BudgetError, match="no group can lose a unit"):
        budget_of(llama, 0.2, kinds=("ffn",), multiple=64)


def test_a_kind_that_is_not_there_and_one_that_may_not_go(llama):
    with pytest.raises(RecipeError, match="no group is of kind 'expert'"):
        targets(llama.groups, ["expert"])
    with pytest.raises(NothingPrunableError, match="reads its rows by number"):
        targets(llama.groups, ["vocabulary"])


def test_adapters_do_not_count(adapted, llama):
    counted = {name for name, p in adapted.model.named_parameters() if "lora_" not in name}
    budget = uniform_budget(
        adapted.groups,
        targets(adapted.groups, ["ffn"]),
        scores_of(adapted.groups),
        remove=0.2,
        width_multiple={"ffn": 8},
        counted=counted,
    )
    assert budget.before == sum(parameter.numel() for parameter in llama.model.parameters())
