"""LoRAPrune from the recipe."""

from __future__ import annotations

from torch import Tensor

from graphprune.prune.budget import targets
from graphprune.prune.cubic_schedule import CubicSchedule
from graphprune.prune.loraprune import LoRAPrune
from graphprune.prune.methods.registry import Pruned, Task, finished, method
from graphprune.prune.methods.training import calibrated_repair, train_task, unpruned
from graphprune.prune.param_groups import even_scores, param_groups
from graphprune.prune.precision import computing_in_bfloat16, use_bfloat16
from graphprune.prune.repair.named import Repair


@method("loraprune")
def loraprune(task: Task) -> Pruned:
    """Prune by LoRAPrune: masks on a cubic schedule, by the adapters' gradients, while they train.

    As in the paper all groups lose one share, unless a knowledge distribution is measured, which then decides. The
    paper trains on the text alone and repairs nothing: `training.distill` 0 and `repair` none.
    """
    settings, training, own = task.settings, task.settings.training, task.settings.loraprune
    budget = task.allot(task.scores() if settings.distribution.ratios else _even(task))
    params = param_groups(task.model, task.groups, settings.kinds)
    repair: Repair | None = None
    optimizer = LoRAPrune(
        params,
        schedule=CubicSchedule(own.steps, own.warmup, own.cooldown, own.every),
        units=budget.removed_units,
        lr=training.learning_rate,
        released=own.importance == "released",
        memory=own.memory,
        on_removal=lambda: repair.update(optimizer.redundant) if repair else None,
    )
    try:
        with computing_in_bfloat16(task.model, use_bfloat16(training, task.model)):
            repair = calibrated_repair(task, optimizer.gates)
            rows = train_task(
                task,
                "LoRAPrune",
                optimizer,
                unpruned(task.model, optimizer.gates),
                steps=own.steps,
                warmup=1,
                trainable=params.trainable,
            )
        return finished(task, optimizer.plan, budget, rows, repair)
    finally:
        optimizer.close()


def _even(task: Task) -> dict[str, Tensor]:
    """Return scores by which all groups lose the same share."""
    return {group.name: even_scores(group) for group in targets(task.groups, task.settings.kinds)}
