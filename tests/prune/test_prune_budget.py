from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import BudgetError, NothingPrunableError, RecipeError, TrainingError
from graphprune.prune.budget import allot, normalised_by_kind, score_curves, targets
from graphprune.prune.costs import Measured, cost_named
from graphprune.prune.distribution import Distribution, Sensitivity
from graphprune.prune.target import recipe_budget
from graphprune.recipe import Distribution as Asked
from graphprune.recipe import Prune
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan

BOTH = ("ffn", "attention_heads")


def scores_of(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(group.size, generator=generator) for name, group in groups.items()}


def cost_of(traced_model, names, unit="parameters", counted=None):
    counted = counted or set(dict(traced_model.model.named_parameters()))
    return cost_named(unit, Measured(traced_model.groups, counted, sequence=16), names)


def budget_of(traced_model, remove, kinds=BOTH, scores=None, multiple=8, unit="parameters", **options):
    chosen = targets(traced_model.groups, kinds)
    scores = scores or scores_of(traced_model.groups)
    return allot(
        traced_model.groups,
        score_curves({group.name: scores[group.name] for group in chosen}),
        cost_of(traced_model, [group.name for group in chosen], unit),
        remove=remove,
        width_multiple={"ffn": multiple},
        **options,
    )


@settings(max_examples=10)
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


@settings(max_examples=40)
@given(st.sampled_from(["parameters", "macs", "bytes"]), st.floats(0.05, 0.4), st.integers(0, 5))
def test_each_layer_its_own_width_comes_within_a_step_of_one_layer(llama, unit, remove, seed):
    scores = scores_of(llama.groups, seed)
    budget = budget_of(llama, remove, scores=scores, unit=unit, layout="per_layer", keep_at_least=0.25)
    names = [group.name for group in targets(llama.groups, BOTH)]
    cost = cost_of(llama, names, unit)
    step = min(cost() - cost({n: llama.groups[n].size - (8 if "mlp" in n else 1)}) for n in names)
    assert abs(budget.after - budget.before * (1 - remove)) <= step
    assert budget.after == cost(budget.kept_units(llama.groups))
    for name in names:
        size = llama.groups[name].size
        kept = size - budget.removed_units.get(name, 0)
        assert kept >= 0.25 * size
        assert llama.groups[name].kind != "ffn" or kept % 8 == 0
    uniform = budget_of(llama, budget.removed_share, scores=scores, unit=unit, keep_at_least=0.25)
    if abs(uniform.after - budget.after) < 1e-6:  # the same saving: more freedom never loses more
        assert lost(scores, budget) <= lost(scores, uniform) + 1e-6


def lost(scores, budget):
    return sum(
        float(scores[name].sort().values[:count].sum()) for name, count in budget.removed_units.items()
    )


def test_the_cache_shrinks_by_heads_alone(llama):
    budget = budget_of(llama, 0.25, unit="kv_bytes", layout="per_layer")
    assert {llama.groups[name].kind for name in budget.removed_units} == {"attention_heads"}
    assert budget.removed_share == 0.25
    assert budget.unit == "kv_bytes"
    with pytest.raises(BudgetError, match="no unit of ffn saves any kv_bytes"):
        budget_of(llama, 0.25, kinds=("ffn",), unit="kv_bytes")


def test_layers_are_uniform_and_widths_a_multiple(llama):
    budget = budget_of(llama, 0.2)
    by_kind = {}
    for name, count in budget.removed_units.items():
        by_kind.setdefault(llama.groups[name].kind, set()).add(count)
        if llama.groups[name].kind == "ffn":
            assert (llama.groups[name].size - count) % 8 == 0
    assert by_kind
    assert all(len(counts) == 1 for counts in by_kind.values())
    assert budget.is_uniform(llama.groups)


def test_a_layout_of_its_own_is_not_uniform(llama):
    """One layer's channels are worth nothing: they go, and the other layer keeps its own."""
    first, second = llama.of_kind("ffn")
    scores = scores_of(llama.groups)
    scores[first] = scores[first] * 1e-6
    budget = budget_of(llama, 0.1, kinds=("ffn",), scores=scores, layout="per_layer")
    assert budget.removed_units[first] > budget.removed_units.get(second, 0)
    assert not budget.is_uniform(llama.groups)


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


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_no_kind_pays_for_the_other_because_its_scores_are_in_another_unit(llama, layout):
    names = llama.of_kind("attention_heads") + llama.of_kind("ffn")
    cost = cost_of(llama, names)
    scores = scores_of(llama.groups, seed=2)

    def curves(factor):
        return score_curves({name: scores[name] * (factor if "mlp" in name else 1) for name in names})

    def removed(curves):
        return allot(
            llama.groups, curves, cost, remove=0.3, layout=layout, width_multiple={"ffn": 8}
        ).removed_units

    assert removed(curves(1e-6)) != removed(curves(1e6))
    normalised = [normalised_by_kind(curves(factor), llama.groups, cost) for factor in (1e-6, 1, 1e6)]
    assert removed(normalised[0]) == removed(normalised[1]) == removed(normalised[2])
    for kind in ("ffn", "attention_heads"):
        same = llama.of_kind(kind)
        saved = cost() - cost(dict.fromkeys(same, 0))
        assert sum(normalised[0][name][-1] for name in same) == pytest.approx(saved)


@pytest.mark.parametrize(
    ("saliency", "normalise", "alike"),
    [
        ("fisher", "auto", False),
        ("taylor", "auto", False),
        ("fisher", "kind", True),
        ("magnitude", "auto", True),
        ("flap", "auto", True),
        ("flap", "none", False),
    ],
)
def test_scores_that_are_not_of_the_loss_do_not_compare_kinds(llama, saliency, normalise, alike):
    settings = Prune(
        remove=0.3, saliency=saliency, normalise=normalise, width_multiple={"ffn": 8}, layout="per_layer"
    )
    counted = {member.parameter for group in llama.groups.values() for member in group.members}
    scores = scores_of(llama.groups, seed=2)
    budgets = [
        recipe_budget(
            llama.groups,
            settings,
            {name: score * (factor if "mlp" in name else 1) for name, score in scores.items()},
            counted=counted,
        )
        for factor in (1e-6, 1e6)
    ]
    assert (budgets[0].removed_units == budgets[1].removed_units) == alike


def test_each_group_keeps_the_least_share(llama):
    free = budget_of(llama, 0.35, kinds=("ffn",), multiple=1)
    assert min(free.kept_units(llama.groups).values()) < 36
    with pytest.raises(BudgetError, match="the nearest is"):
        budget_of(llama, 0.35, kinds=("ffn",), multiple=1, keep_at_least=0.75)
    held = budget_of(llama, 0.1, kinds=("ffn",), multiple=1, keep_at_least=0.75, layout="per_layer")
    assert min(held.kept_units(llama.groups).values()) >= 36


def test_a_share_out_of_reach_says_what_can_be_had(llama):
    with pytest.raises(BudgetError, match="the nearest is"):
        budget_of(llama, 0.9)


def test_a_width_multiple_that_no_group_can_keep(llama):
    with pytest.raises(BudgetError, match="no group can lose a unit"):
        budget_of(llama, 0.2, kinds=("ffn",), multiple=64)


def test_a_score_that_is_no_number_is_not_sorted(llama):
    scores = scores_of(llama.groups)
    scores[llama.of_kind("ffn")[0]][3] = float("nan")
    with pytest.raises(TrainingError, match="saliency that is not finite"):
        budget_of(llama, 0.2, scores=scores)


def test_a_kind_that_is_not_there_and_one_that_may_not_go(llama):
    with pytest.raises(RecipeError, match="no kind of node groups is named"):
        targets(llama.groups, ())
    with pytest.raises(RecipeError, match="no group is of kind 'expert'"):
        targets(llama.groups, ["expert"])
    with pytest.raises(NothingPrunableError, match="reads its rows by number"):
        targets(llama.groups, ["vocabulary"])


def test_adapters_do_not_count(adapted, llama):
    counted = {name for name, p in adapted.model.named_parameters() if "lora_" not in name}
    settings = Prune(kinds=("ffn",), width_multiple={"ffn": 8})
    budget = recipe_budget(adapted.groups, settings, scores_of(adapted.groups), counted=counted)
    assert budget.before == sum(parameter.numel() for parameter in llama.model.parameters())


def test_what_was_measured_decides_how_many_and_scores_do_not(llama):
    counted = set(dict(llama.model.named_parameters()))
    first, second = llama.of_kind("ffn")
    settings = Prune(remove=0.1, kinds=("ffn",), layout="per_layer", width_multiple={"ffn": 8})
    measured = Distribution(
        3.0, {first: Sensitivity((12, 24), (0.5, 2.0)), second: Sensitivity((12, 24), (0.01, 0.02))}
    )
    for seed in range(3):
        scores = scores_of(llama.groups, seed)
        scores[second] = 100 * scores[second]
        removed = recipe_budget(llama.groups, settings, scores, counted=counted, distribution=measured)
        assert removed.removed_units.get(first, 0) < removed.removed_units[second]


def test_the_most_sensitive_groups_stay_whole_if_the_recipe_says_so(llama):
    """Even those whose first units would be free to take."""
    counted = set(dict(llama.model.named_parameters()))
    first, second = llama.of_kind("ffn")
    measured = Distribution(
        3.0, {first: Sensitivity((16, 24), (0.0, 5.0)), second: Sensitivity((16, 24), (0.5, 1.0))}
    )
    for unprunable, losing in ((0.0, first), (0.5, second)):
        settings = Prune(
            remove=0.08,
            kinds=("ffn",),
            layout="per_layer",
            width_multiple={"ffn": 8},
            distribution=Asked(ratios=(0.5,), unprunable=unprunable),
        )
        budget = recipe_budget(
            llama.groups, settings, scores_of(llama.groups), counted=counted, distribution=measured
        )
        assert set(budget.removed_units) == {losing}


def test_the_recipes_keys_reach_the_budget(llama):
    counted = set(dict(llama.model.named_parameters()))
    scores = scores_of(llama.groups)
    plain = Prune(remove=0.2, width_multiple={"ffn": 8}, sequence=16)

    def removed(**changes):
        return recipe_budget(llama.groups, plain.model_copy(update=changes), scores, counted=counted)

    assert removed(layout="per_layer").removed_units != removed().removed_units
    assert removed(budget="macs").unit == "macs"
    assert removed(budget="macs", sequence=4).before < removed(budget="macs").before
    assert removed(budget="bytes", weight_bits=9).before > removed(budget="bytes").before
    assert removed(budget="bytes", embedding_bits=16).before > removed(budget="bytes").before
    few, many = ({n: s * (x if "mlp" in n else 1) for n, s in scores.items()} for x in (1e-6, 1e6))
    for normalise, same in (("kind", True), ("none", False)):
        changed = plain.model_copy(update={"normalise": normalise})
        of = [recipe_budget(llama.groups, changed, s, counted=counted).removed_units for s in (few, many)]
        assert (of[0] == of[1]) == same
    kept = removed(remove=0.08, keep_at_least=0.7).kept_units(llama.groups)
    assert all(count >= 0.7 * llama.groups[name].size for name, count in kept.items())
    assert np.isfinite(removed().after)
