"""Whole blocks in one shot: those that turn their input the least go (ShortGPT)."""

from __future__ import annotations

import copy
from typing import Any

import torch

from graphprune.prune.blocks import drop_least_influential
from graphprune.prune.budget import Budget
from graphprune.prune.methods.registry import Pruned, Task, method
from graphprune.shrink.plan import Plan


@method("blocks")
def blocks(task: Task) -> Pruned:
    """Remove the blocks of least influence, as many as come nearest to the share of the parameters.

    No group loses units, so the plan is empty and nothing is repaired. The smaller model's outputs have been compared
    with those of the model whose blocks are skipped.

    Raises:
        BudgetError: If no number of blocks comes near the share.
    """
    settings = task.settings
    windows = task.windows.drawn(settings.calibration_windows, task.seed)
    base: Any = copy.deepcopy(task.model).unload().eval()
    with task.announce("block influence", None):
        dropped = drop_least_influential(base, windows.split(settings.training.batch_size), settings.remove)
    before = sum(parameter.numel() for parameter in base.parameters())
    budget = Budget({}, before, before * (1 - dropped.removed_share), settings.remove)
    with torch.no_grad():
        logits = dropped.model(**task.example_inputs).logits
    return Pruned(Plan({}), budget, [], logits, None, dropped.model)
