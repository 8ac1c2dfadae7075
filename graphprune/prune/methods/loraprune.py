"""LoRAPrune from the recipe."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from graphprune.prune.budget import Budget, targets
from graphprune.prune.cubic_schedule import CubicSchedule
from graphprune.prune.loraprune import LoRAPrune
from graphprune.prune.methods.registry import Pruned, Task, finished, method
from graphprune.prune.methods.training import calibrated_repair, train_task, unpruned
from graphprune.prune.param_groups import even_scores, param_groups
from graphprune.prune.precision import computing_in_bfloat16, use_bfloat16
from graphprune.prune.repair.named import Repair


def check(task: Task) -> None:
    """Raise if the budget cannot be met, or groups have no weight with an adapter."""
    _optimizer(task, _budget(task)).close()


@method("loraprune", check)
def loraprune(task: Task) -> Pruned:
    """Prune by LoRAPrune: masks on a cubic schedule, by the adapters' gradients, while they train.

    As in the paper all groups lose one share, unless a knowledge distribution is measured, which then decides. The
    paper trains on the text alone and repairs nothing: `training.distill` 0 and `repair` none.
    """
    settings, training = task.settings, task.settings.training
    budget = _budget(task)
    repair: Repair | None = None
    optimizer = _optimizer(task, budget, lambda: repair.update(optimizer.redundant) if repair else None)
    try:
        with computing_in_bfloat16(task.model, use_bfloat16(training, task.model)):
            repair = calibrated_repair(task, optimizer.gates)
            rows = train_task(
                task,
                "LoRAPrune",
                optimizer,
                unpruned(task.model, optimizer.gates),
                steps=settings.loraprune.steps,
                warmup=1,
            )
        return finished(task, optimizer.plan, budget, rows, repair)
    finally:
        optimizer.close()


def _budget(task: Task) -> Budget:
    return task.allot(task.scores() if task.settings.distribution.ratios else _even(task))


def _even(task: Task) -> dict[str, Tensor]:
    """Return scores by which all groups lose the same share."""
    return {group.name: even_scores(group) for group in targets(task.groups, task.settings.kinds)}


def _optimizer(task: Task, budget: Budget, on_removal: Callable[[], None] | None = None) -> LoRAPrune:
    settings, own = task.settings, task.settings.loraprune
    return LoRAPrune(
        param_groups(task.model, task.groups, settings.kinds),
        schedule=CubicSchedule(own.steps, own.warmup, own.cooldown, own.every),
        units=budget.removed_units,
        lr=settings.training.learning_rate,
        released=own.importance == "released",
        memory=own.memory,
        on_removal=on_removal,
    )
