"""LHSPG from the recipe: the least salient units fade to zero while adapters learn to do without them."""

from __future__ import annotations

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


@method("lhspg")
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
    params = param_groups(task.model, task.groups, settings.kinds)
    repair: Repair | None = None
    optimizer = LHSPG(
        params,
        units=budget.removed_units,
        lr=training.learning_rate,
        mode=settings.mode,
        paper=PaperChoices(**settings.paper.model_dump()),
        warmup_steps=settings.warmup_steps,
        periods=settings.periods,
        period_steps=settings.period_steps,
        half_space=settings.half_space,
        scores=scores if gated else None,
        memory=MEMORY if settings.saliency == OBSERVED else 1.0,
        on_period=lambda: repair.update(optimizer.redundant) if repair else None,
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
                trainable=params.trainable,
            )
        return finished(task, optimizer.plan, budget, rows, repair)
    finally:
        optimizer.close()
