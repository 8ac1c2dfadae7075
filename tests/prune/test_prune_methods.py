"""Methods behind one interface, called as a program of one's own would."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from lhspg_bench import adapted_llama, llama_groups

import graphprune as gp
from graphprune.errors import RecipeError, TrainingError
from graphprune.prune.budget import Budget
from graphprune.prune.cubic_schedule import CubicSchedule
from graphprune.prune.methods import lhspg, loraprune
from graphprune.prune.methods.registry import Task, finished, method_named
from graphprune.prune.methods.training import unpruned
from graphprune.prune.target import recipe_budget
from graphprune.recipe import Prune
from graphprune.saliency.gates import Gates
from graphprune.shrink.plan import Plan
from graphprune.source.model import example_inputs
from graphprune.source.text import Windows

IDS = torch.arange(96).reshape(8, 12) % 60 + 3
SETTINGS = {
    "width_multiple": {"ffn": 4},
    "calibration_windows": 4,
    "training": {"batch_size": 2, "precision": "float32", "learning_rate": 1e-3},
}


SHORT = {"warmup_steps": 1, "periods": 2, "period_steps": 2, "settle_steps": 1}


def announced(title, steps):
    return nullcontext(lambda done, words="": None)


def task(**settings) -> Task:
    model, groups = adapted_llama(), llama_groups()
    counted = {name for name, p in model.named_parameters() if not p.requires_grad}
    recipe = Prune(**{**SETTINGS, **settings})
    return Task(
        model,
        groups,
        recipe,
        Windows(IDS, "numbers"),
        allot=lambda scores: recipe_budget(groups, recipe, scores, counted=counted),
        example_inputs=example_inputs(model),
        seed=0,
        announce=announced,
    )


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("saliency", ["magnitude", "flap", "wanda", "taylor_first"])
def test_one_shot_takes_the_lowest_scores(saliency, layout):
    given = task(method="one_shot", saliency=saliency, layout=layout, repair="none")
    scores = given.scores()
    counts = given.allot(scores).removed_units
    by_hand = {
        name: sorted(sorted(range(len(scores[name])), key=lambda unit, name=name: float(scores[name][unit]))[:n])
        for name, n in counts.items()
    }  # fmt: skip
    before = {name: p.detach().clone() for name, p in given.model.named_parameters()}
    pruned = method_named("one_shot")(given)
    assert pruned.plan == Plan(by_hand)
    assert pruned.metrics == []
    assert all(torch.equal(before[name], p) for name, p in given.model.named_parameters())
    small = pruned.cut(lambda: gp.shrink(given.model, given.groups, pruned.plan, given.example_inputs))
    with torch.no_grad():
        torch.testing.assert_close(
            small(**given.example_inputs).logits, pruned.masked_logits, atol=1e-4, rtol=1e-4
        )


def test_repairs_bring_the_model_nearer_to_what_it_was():
    """On the calibration text, in logits; nothing else differs between the three."""
    distances = {}
    for repair in ("none", "bias", "least_squares"):
        given = task(
            method="one_shot", saliency="random", repair=repair, calibration_windows=8, kinds=["ffn"]
        )
        with torch.no_grad():
            dense = given.model(input_ids=IDS).logits
            pruned = method_named("one_shot")(given)
            small = pruned.cut(
                lambda given=given, pruned=pruned: gp.shrink(
                    given.model, given.groups, pruned.plan, given.example_inputs
                )
            )
            distances[repair] = float((small(input_ids=IDS).logits - dense).norm())
    assert distances["least_squares"] < 0.9 * distances["none"]
    assert distances["bias"] < distances["none"]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lhspg", **SHORT},
        {"method": "lhspg", "mode": "paper", "warmup_steps": 1, "periods": 1, "period_steps": 2},
        {"method": "loraprune", "loraprune": {"steps": 6, "every": 2}},
    ],
)
def test_methods_that_train_end_in_the_budgets_counts(settings):
    given = task(**settings)
    adapters = [p for p in given.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in adapters]
    pruned = method_named(settings["method"])(given)
    assert {name: len(units) for name, units in pruned.plan.items()} == pruned.budget.removed_units
    assert pruned.metrics[-1]["zeroed"] == pruned.metrics[-1]["target"] > 0
    assert not all(torch.equal(one, other) for one, other in zip(before, adapters))
    small = pruned.cut(lambda: gp.shrink(given.model, given.groups, pruned.plan, given.example_inputs))
    with torch.no_grad():
        torch.testing.assert_close(
            small(**given.example_inputs).logits, pruned.masked_logits, atol=1e-4, rtol=1e-4
        )


def test_scores_that_gates_do_not_observe_are_not_mixed_with_those_that_they_do():
    plans = [
        method_named(name)(task(method=name, saliency="magnitude", **schedule)).plan
        for name, schedule in (("one_shot", {}), ("lhspg", SHORT))
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("method", ["lhspg", "loraprune"])
def test_gates_go_in_training_with_what_stands_in_for_them(method):
    """At the end every removed unit is predicted by the others: the last removal was repaired too."""
    schedule = SHORT if method == "lhspg" else {"loraprune": {"steps": 6, "every": 2}}
    given = task(method=method, **schedule)
    pruned = method_named(method)(given)
    known = pruned.repair._done
    assert sum(int(mask.sum()) for mask in known.values()) == sum(
        len(units) * (1 if given.groups[name].kind == "ffn" else 16) for name, units in pruned.plan.items()
    )


def test_paper_mode_computes_in_bfloat16_and_keeps_what_it_wrote():
    """Frozen weights held in bfloat16 for a while are put back afterwards, and would bring units back."""
    given = task(
        mode="paper",
        warmup_steps=1,
        periods=1,
        period_steps=2,
        training={"batch_size": 2, "precision": "bfloat16", "learning_rate": 1e-3},
    )
    pruned = method_named("lhspg")(given)
    for name, units in pruned.plan.items():
        group = given.groups[name]
        for member in group.members:
            if member.side == "produces":
                weight = given.model.get_parameter(member.parameter)
                assert weight.dtype == torch.float32
                for unit in units:
                    rows = torch.from_numpy(group.indices(member, unit))
                    assert not weight.detach().index_select(member.axis, rows).any()


def test_paper_mode_chooses_units_by_its_own_saliency():
    plans = [
        method_named("lhspg")(task(mode="paper", saliency=saliency, kinds=["ffn"], **SHORT)).plan
        for saliency in ("random", "magnitude")
    ]
    assert plans[0] == plans[1]


def test_the_teacher_is_the_model_as_it_was():
    """Whatever gates and adapters are now."""
    given = task()
    with torch.no_grad():
        dense = given.model(input_ids=IDS).logits
        gates = Gates(given.model, given.groups, [n for n, g in given.groups.items() if g.kind == "ffn"])
        for value in [*gates.values.values(), *(p for p in given.model.parameters() if p.requires_grad)]:
            value.uniform_()
        assert not torch.allclose(given.model(input_ids=IDS).logits, dense, atol=0.1)
        torch.testing.assert_close(unpruned(given.model, gates)(IDS), dense)
    gates.close()


def arguments_of(monkeypatch, module, name, given) -> dict:
    """Return what a method gives its optimizer."""

    class Seen(Exception):
        pass

    def look(params, **options):
        raise Seen(options)

    monkeypatch.setattr(module, name, look)
    with pytest.raises(Seen) as caught:
        method_named(given.settings.method)(given)
    return caught.value.args[0]


def test_the_recipe_reaches_loraprune(monkeypatch):
    own = {"steps": 7, "warmup": 0.2, "cooldown": 0.3, "every": 4, "memory": 0.5, "importance": "released"}
    found = arguments_of(monkeypatch, loraprune, "LoRAPrune", task(method="loraprune", loraprune=own))
    assert found["schedule"] == CubicSchedule(7, 0.2, 0.3, 4)
    assert (found["released"], found["memory"], found["lr"]) == (True, 0.5, 1e-3)
    plain = arguments_of(monkeypatch, loraprune, "LoRAPrune", task(method="loraprune"))
    assert (plain["released"], plain["memory"]) == (False, 0.9)
    assert plain["schedule"] == CubicSchedule(300, 0.1, 0.1, 10)


def test_the_recipe_reaches_paper_mode(monkeypatch):
    given = task(
        mode="paper", half_space=0.3, paper={"saliency": "cosine", "gamma": 0.5, "forget": False}, **SHORT
    )
    found = arguments_of(monkeypatch, lhspg, "LHSPG", given)
    assert found["mode"] == "paper"
    assert found["paper"] == gp.PaperChoices(saliency="cosine", gamma=0.5, forget=False)
    assert (found["half_space"], found["warmup_steps"], found["period_steps"]) == (0.3, 1, 2)


def test_loraprune_shares_alike_unless_a_distribution_decides():
    """Every group of a kind loses the same, and no score is looked at."""
    given = task(method="loraprune", saliency="no such saliency", loraprune={"steps": 2, "every": 1})
    method_named("loraprune")(given)
    with pytest.raises(RecipeError, match="no saliency"):
        method_named("loraprune")(
            task(method="loraprune", saliency="no such saliency", distribution={"ratios": [0.5]})
        )


def test_another_number_of_units_than_asked_for_is_an_error():
    given = task(method="one_shot")
    name = next(name for name, group in given.groups.items() if group.prunable)
    budget = Budget({name: 2}, 1.0, 0.9, 0.1)
    with pytest.raises(TrainingError, match=f"one_shot removed 1 units of '{name}' instead of 2"):
        finished(given, Plan({name: [0]}), budget, [], None)


def test_an_unknown_method_is_named_with_what_is_meant():
    with pytest.raises(
        RecipeError, match=r"there is no pruning method 'lorapune'\n.*did you mean 'loraprune'"
    ):
        method_named("lorapune")
