"""LHSPG from the recipe: the least salient units fade to zero while adapters learn to do without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from graphprune.prune.budget import Budget
from graphprune.prune.lhspg import LHSPG
from graphprune.prune.methods.registry import Pruned, Task, finished, method
from graphprune.prune.methods.training import calibrated_repair, train_task, unpruned
from graphprune.prune.paper_mode import PaperChoices
from graphprune.prune.param_groups import param_groups
from graphprune.prune.precision import computing_in_bfloat16, use_bfloat16
from graphprune.prune.repair.named import Repair

OBSERVED = "fisher"
"""What gates tell on the way; scores of another kind are on another scale, and are kept as they are."""
MEMORY = 0.9
"""Share of the old saliency that a step keeps."""


def check(task: Task) -> None:
    """Raise if the budget cannot be met, or the mode cannot work on this model."""
    scores = task.scores()
    _optimizer(task, task.allot(scores), scores).close()


@method("lhspg", check)
def lhspg(task: Task) -> Pruned:
    """Prune by LHSPG, in either mode.

    Paper mode writes to the weights. So it learns from the text alone and nothing is repaired, which the recipe sees
    to; the weights stay in their own precision, whatever is computed in; and what the model came with is lost: load it
    anew. Units are chosen by the mode's own saliency, and the recipe's decides only how many go of each group.
    """
    settings, training = task.settings, task.settings.training
    gated = settings.mode == "gated"
    scores = task.scores()
    budget = task.allot(scores)
    repair: Repair | None = None
    optimizer = _optimizer(
        task, budget, scores, lambda: repair.update(optimizer.redundant) if repair else None
    )
    try:
        with computing_in_bfloat16(task.model, gated and use_bfloat16(training, task.model)):
            if gated:
                repair = calibrated_repair(task, optimizer.gates)
            rows = train_task(
                task,
                "LHSPG",
                optimizer,
                unpruned(task.model, optimizer.gates) if gated else None,
                steps=optimizer.schedule_steps + settings.settle_steps,
                warmup=max(1, settings.warmup_steps // 2),
            )
        return finished(task, optimizer.plan, budget, rows, repair)
    finally:
        optimizer.close()


def _optimizer(
    task: Task, budget: Budget, scores: Mapping[str, Tensor], on_period: Callable[[], None] | None = None
) -> LHSPG:
    settings = task.settings
    return LHSPG(
        param_groups(task.model, task.groups, settings.kinds),
        units=budget.removed_units,
        lr=settings.training.learning_rate,
        mode=settings.mode,
        paper=PaperChoices(**settings.paper.model_dump()) if settings.mode == "paper" else None,
        warmup_steps=settings.warmup_steps,
        periods=settings.periods,
        period_steps=settings.period_steps,
        half_space=settings.half_space,
        scores=scores if settings.mode == "gated" else None,
        memory=MEMORY if settings.saliency == OBSERVED else 1.0,
        on_period=on_period,
    )
