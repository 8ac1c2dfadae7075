"""What methods that train have in common: the teacher, the text, the loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphprune.prune.methods.registry import Task
from graphprune.prune.precision import use_bfloat16
from graphprune.prune.repair.activations import Calibration
from graphprune.prune.repair.named import Repair, repair_named
from graphprune.prune.training import Logits, Objective, Row, logits_of, train
from graphprune.saliency.gates import Gates


def unpruned(model: Any, gates: Gates) -> Logits:
    """Return the model as it was, as a teacher: gates open, adapters off; the same weights, no second copy."""

    def logits(ids: Tensor) -> Tensor:
        with gates.opened(), model.disable_adapter():
            found: Tensor = model(input_ids=ids, use_cache=False).logits
            return found

    return logits


def calibrated_repair(task: Task, gates: Gates) -> Repair | None:
    """Return the repair that the recipe names, calibrated on the un-pruned model."""
    settings = task.settings
    windows = task.windows.drawn(settings.calibration_windows, task.seed)
    calibration = Calibration.of_windows(windows, settings.training.batch_size, unpruned(task.model, gates))
    return repair_named(settings.repair, task.model, task.groups, gates, calibration)


def train_task(
    task: Task,
    title: str,
    optimizer: Any,
    teacher: Logits | None,
    *,
    steps: int,
    warmup: int,
) -> list[Row]:
    """Train adapters on the task's text while an optimizer takes units away.

    Args:
        task: The task.
        title: For whoever watches.
        optimizer: Its `counts` say how many units are gone, ``zeroed``, and how many are to go, ``target``; its first
            parameter group is what trains, and whose gradients are clipped.
        teacher: To distil from; None to learn from the text alone.
        steps: How many.
        warmup: Steps of the learning rate's warm-up.
    """
    training = task.settings.training
    bfloat16 = use_bfloat16(training, task.model)
    with task.announce(title, steps) as tick:
        return train(
            task.windows.batches(training.batch_size, task.seed),
            Objective(logits_of(task.model), teacher, training.distill, bfloat16),
            optimizer,
            steps=steps,
            warmup=warmup,
            trainable=optimizer.param_groups[0]["params"],
            observe=lambda: optimizer.counts,
            progress=lambda row: tick(row["step"] + 1, _words(row)),
        )


def _words(row: Row) -> str:
    return f"loss {row['loss']:.3f}, {row['zeroed']} of {row['target']} units gone"
