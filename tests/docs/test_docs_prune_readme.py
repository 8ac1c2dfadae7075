"""What the README of pruning shows runs, and what its tables name exists."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lhspg_bench import IDS, adapted_llama, llama_groups

from graphprune.prune.budget import Budget
from graphprune.prune.methods import registry
from graphprune.recipe import Prune
from graphprune.saliency.registry import registered_saliencies, saliency_named
from graphprune.source.model import example_inputs
from graphprune.source.text import Windows

README = (Path(__file__).parents[2] / "graphprune" / "prune" / "README.md").read_text(encoding="utf-8")


def published() -> list[list[str]]:
    table = README.split("| published |")[1].split("\n\n")[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


def test_published_methods_are_settings_that_exist():
    rows = published()
    assert len(rows) >= 8
    for _, method, saliencies, repair, *_ in rows:
        for name in re.findall(r"`(\w+)`", saliencies):
            saliency_named(name)
        (name,), (repair_name,) = (re.findall(r"`(\w+)`", cell) for cell in (method, repair))
        registry.method_named(name)
        assert Prune(method=name, repair=repair_name).repair == repair_name


def test_the_saliencies_are_those_that_are_registered_with_a_line_each():
    table = README.split("| `saliency` |")[2].split("\n\n")[0]
    rows = [row.strip("|").split(" | ") for row in table.splitlines()[2:]]
    names = [re.findall(r"`(\w+)`", name)[0] for name, _ in rows]
    assert sorted(names) == list(registered_saliencies())
    assert all(len(words.strip()) > 5 for _, words in rows)
    default = Prune.model_fields["saliency"].default
    assert [name for name, _ in rows if "default" in name] == [f" `{default}` (default)"]


def test_settings_that_methods_are_said_to_have_are_keys_of_the_recipe():
    table = README.split("settings of its own |")[1].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        method, _, own = (re.findall(r"`(\w+)`", cell) for cell in row.strip("|").split("|"))
        registry.method_named(*method)
        assert set(own) <= set(Prune.model_fields)


@pytest.fixture
def methods():
    registry.method_named("lhspg")
    before = dict(registry._METHODS)
    yield registry
    registry._METHODS.clear()
    registry._METHODS.update(before)


def test_a_method_of_ones_own_is_called_like_any_other(methods):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(code, {})
    model, groups = adapted_llama(), llama_groups()
    name = next(name for name, group in groups.items() if group.kind == "ffn")
    task = registry.Task(
        model,
        groups,
        Prune(method="first_units", saliency="random", training={"precision": "float32"}),
        Windows(IDS, "numbers"),
        allot=lambda scores: Budget({name: 3}, 1.0, 0.9, 0.1),
        example_inputs=example_inputs(model),
        seed=0,
        announce=lambda title, steps: nullcontext(lambda done, words="": None),
    )
    pruned = methods.method_named("first_units")(task)
    assert dict(pruned.plan) == {name: (0, 1, 2)}
    with torch.no_grad():
        assert not torch.allclose(model(**task.example_inputs).logits, pruned.masked_logits, atol=1e-4)
