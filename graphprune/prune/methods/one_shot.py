"""One shot: score, decide, remove, repair. Nothing is trained."""

from __future__ import annotations

from graphprune.prune.methods.registry import Pruned, Task, finished, method
from graphprune.prune.methods.training import calibrated_repair
from graphprune.prune.one_shot import shut_least
from graphprune.prune.precision import computing_in_bfloat16, use_bfloat16
from graphprune.saliency.gates import Gates
from graphprune.shrink.plan import Plan


def check(task: Task) -> None:
    """Raise if units cannot be scored or gated, or the budget cannot be met."""
    Gates(task.model, task.groups, task.allot(task.scores()).removed_units).close()


@method("one_shot", check)
def one_shot(task: Task) -> Pruned:
    """Remove the units of the lowest saliency, at once.

    With it the methods that only score are settings of `saliency` and `repair`; the README of `prune` lists them.
    """
    scores = task.scores()
    budget = task.allot(scores)
    gates = Gates(task.model, task.groups, budget.removed_units)
    try:
        with computing_in_bfloat16(task.model, use_bfloat16(task.settings.training, task.model)):
            repair = calibrated_repair(task, gates)
        shut_least(gates, scores, budget, repair)
        return finished(task, Plan(gates.redundant()), budget, [], repair)
    finally:
        gates.close()
