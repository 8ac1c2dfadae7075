"""Saliency, then LHSPG: from a model with adapters to a plan and trained adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import TrainingError
from graphprune.prune.budget import Budget, targets
from graphprune.prune.lhspg import LHSPG
from graphprune.prune.param_groups import param_groups
from graphprune.prune.precision import frozen_in_bfloat16, use_bfloat16
from graphprune.prune.repair import Repair
from graphprune.prune.training import Objective, Progress, Row, logits_of, train
from graphprune.recipe import Prune
from graphprune.saliency.gates import Gates
from graphprune.saliency.registry import Evidence, saliency_named
from graphprune.shrink.plan import Plan
from graphprune.source.text import Windows


@dataclass(frozen=True, slots=True)
class Pruned:
    """The outcome of progressive pruning; the model's adapters are trained in place.

    Attributes:
        plan: Units whose gate is zero.
        budget: What was asked, and what the plan removes.
        metrics: One row a step.
        masked_logits: Outputs on the example inputs with the gates as they ended, to check surgery against.
        repaired: A context in which the model's weights hold the closed-form repair; cut within it.
    """

    plan: Plan
    budget: Budget
    metrics: list[Row]
    masked_logits: Tensor
    repaired: Callable[[], AbstractContextManager[None]]


def unit_scores(
    model: Any, groups: NodeGroups, settings: Prune, windows: Windows, *, seed: int
) -> dict[str, Tensor]:
    """Score every unit that may go on the calibration windows, drawn at random from the training text."""
    gates = Gates(model, groups, [group.name for group in targets(groups, settings.kinds)])
    ids = windows.drawn(settings.calibration_windows, seed)
    autocast = use_bfloat16(settings.training, model)
    objective = Objective(logits_of(model), None, 0.0, autocast)
    try:
        with _computing_in(model, autocast):
            evidence = Evidence(model, groups, gates, ids.split(1), objective, seed)
            return saliency_named(settings.saliency)(evidence)
    finally:
        gates.close()


def prune_progressively(
    model: Any,
    groups: NodeGroups,
    settings: Prune,
    windows: Windows,
    scores: Mapping[str, Tensor],
    *,
    budget: Budget,
    example_inputs: Mapping[str, Any],
    seed: int,
    progress: Progress | None = None,
) -> Pruned:
    """Drive the least salient units to zero while adapters learn to do without them.

    The un-pruned model (gates open, adapters off) is the teacher: the same weights, no second copy.

    Args:
        model: A PEFT model; its adapters are trained in place.
        groups: Its node groups.
        settings: The recipe's section.
        windows: Training text.
        scores: Saliency to start from, by group.
        budget: How many units each group loses.
        example_inputs: For `Pruned.masked_logits`.
        seed: Of the order of batches.
        progress: Told after each step.

    Raises:
        TrainingError: If the loss is not finite, or the schedule ends with another number of units than planned.
    """
    repair: Repair | None = None
    params = param_groups(model, groups, settings.kinds)
    training = settings.training
    optimizer = LHSPG(
        params,
        units=budget.removed_units,
        lr=training.learning_rate,
        warmup_steps=settings.warmup_steps,
        periods=settings.periods,
        period_steps=settings.period_steps,
        half_space=settings.half_space,
        scores=scores,
        on_period=lambda: repair.update(optimizer.redundant) if repair else None,
    )
    gates = optimizer.gates
    try:

        def teacher(ids: Tensor) -> Tensor:
            with gates.opened(), model.disable_adapter():
                logits: Tensor = model(input_ids=ids, use_cache=False).logits
                return logits

        autocast = use_bfloat16(training, model)
        with _computing_in(model, autocast):
            if settings.repair:
                calibration = windows.drawn(settings.calibration_windows, seed).split(training.batch_size)
                repair = Repair(model, gates, calibration, teacher)
            metrics = train(
                windows.batches(training.batch_size, seed),
                Objective(logits_of(model), teacher, training.distill, autocast),
                optimizer,
                steps=optimizer.schedule_steps + settings.settle_steps,
                warmup=max(1, settings.warmup_steps // 2),
                trainable=list(params.trainable),
                observe=lambda: optimizer.counts,
                progress=progress,
            )
        plan = optimizer.plan
        _check_reached(plan, budget)
        model.eval()
        with torch.no_grad():
            masked = model(**example_inputs).logits
    finally:
        optimizer.close()
    return Pruned(plan, budget, metrics, masked, repair.folded if repair else nullcontext)


@contextmanager
def _computing_in(model: Any, autocast: bool) -> Iterator[None]:
    """Compute in bfloat16 throughout, adapters' inputs included, or leave everything as it is."""
    if not autocast:
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with frozen_in_bfloat16(model), disable_input_dtype_casting(model):
        yield


def _check_reached(plan: Plan, budget: Budget) -> None:
    for name, count in budget.removed_units.items():
        if len(plan.get(name, ())) != count:
            raise TrainingError(
                f"LHSPG removed {len(plan.get(name, ()))} units of '{name}' instead of {count}",
                "give the schedule at least one period of one step",
            )
