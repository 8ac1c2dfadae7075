"""The table of pruning methods: each takes a model with adapters to a plan, and may train the adapters on the way."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import RecipeError, TrainingError
from graphprune.prune.budget import Budget
from graphprune.prune.repair.named import Repair
from graphprune.prune.scoring import unit_scores
from graphprune.prune.training import Row
from graphprune.recipe import Prune
from graphprune.shrink.plan import Plan
from graphprune.source.text import Windows


class Tick(Protocol):
    """Moves what is shown on."""

    def __call__(self, done: int, words: str = "") -> None:
        """Say how many steps are done now, in a few words."""


Announce = Callable[[str, int | None], AbstractContextManager[Tick]]
"""Shows what is being done, and of how many steps it is, while a block runs."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a method is asked to do, and with what.

    Attributes:
        model: A PEFT model. Its adapters may be trained in place and its weights written to.
        groups: Its node groups.
        settings: The recipe's section.
        windows: Training text.
        allot: From the scores of units, by group, to how many units each group loses.
        example_inputs: For `Pruned.masked_logits`.
        seed: Of what is drawn at random.
        announce: Shows what is being done.
    """

    model: Any
    groups: NodeGroups
    settings: Prune
    windows: Windows
    allot: Callable[[Mapping[str, Tensor]], Budget]
    example_inputs: Mapping[str, Any]
    seed: int
    announce: Announce

    def scores(self) -> dict[str, Tensor]:
        """Score every unit that may go by the recipe's saliency, by group."""
        with self.announce(f"saliency ({self.settings.saliency})", None):
            return unit_scores(self.model, self.groups, self.settings, self.windows, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a method leaves.

    Attributes:
        plan: Units to remove.
        budget: What was asked, and what the plan removes.
        metrics: One row a step of training.
        masked_logits: Outputs on the example inputs without those units, to check surgery against.
        repair: What makes up for the units that go; None if nothing does.
        model: The smaller model, where the method does not remove units but made it itself.
    """

    plan: Plan
    budget: Budget
    metrics: list[Row]
    masked_logits: Tensor
    repair: Repair | None
    model: nn.Module | None = None

    def cut(self, shrink: Callable[[], nn.Module]) -> nn.Module:
        """Return the smaller model that `shrink` makes by the plan, the repair in it."""
        if self.model is not None:
            return self.model
        return self.repair.cut(self.plan, shrink) if self.repair else shrink()


def finished(task: Task, plan: Plan, budget: Budget, metrics: list[Row], repair: Repair | None) -> Pruned:
    """Return the outcome of a method whose model computes without the plan's units now.

    Raises:
        TrainingError: If the plan is not what the budget asks for.
    """
    for name, count in budget.removed_units.items():
        if len(plan.get(name, ())) != count:
            raise TrainingError(
                f"{task.settings.method} removed {len(plan.get(name, ()))} units of '{name}' instead of {count}",
                "please report this recipe",
            )
    task.model.eval()
    with torch.no_grad():
        masked = task.model(**task.example_inputs).logits
    return Pruned(plan, budget, metrics, masked, repair)


Method = Callable[[Task], Pruned]
Check = Callable[[Task], None]

_METHODS: dict[str, Method] = {}
_CHECKS: dict[str, Check] = {}
_BUILT_IN = "blocks", "lhspg", "loraprune", "one_shot"
"""Modules that register methods."""
_FEW_WINDOWS, _FEW_TOKENS = 2, 16


def method(name: str, check: Check | None = None) -> Callable[[Method], Method]:
    """Register a function as the method called `name`.

    Args:
        name: What recipes call it.
        check: Raises where the method could not do its task, leaves the model as it was, and takes no time: it is
            given a few tokens of text only, and an `allot` that measures nothing.
    """

    def register(function: Method) -> Method:
        _METHODS[name] = function
        if check:
            _CHECKS[name] = check
        return function

    return register


def check_task(task: Task) -> None:
    """Find out in little time whether a method can do its task, as far as that can be told beforehand.

    Raises:
        GraphPruneError: If it cannot.
    """
    name = task.settings.method
    method_named(name)
    if name in _CHECKS:
        few = Windows(task.windows.ids[:_FEW_WINDOWS, :_FEW_TOKENS], task.windows.name)
        _CHECKS[name](replace(task, windows=few))
        task.model.zero_grad(set_to_none=True)


def method_named(name: str) -> Method:
    """Return a registered method.

    Raises:
        RecipeError: If there is none of that name.
    """
    _load()
    if name not in _METHODS:
        raise RecipeError.unknown("pruning method", name, _METHODS, "prune.method")
    return _METHODS[name]


@cache
def _load() -> None:
    for name in _BUILT_IN:
        importlib.import_module(f"graphprune.prune.methods.{name}")
