"""Whole blocks in one shot: those that turn their input the least go (ShortGPT)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from graphprune.prune.blocks import choose_blocks, drop_least_influential
from graphprune.prune.budget import Budget
from graphprune.prune.methods.registry import Pruned, Task, method
from graphprune.shrink.plan import Plan
from graphprune.trace.blocks import find_blocks
from graphprune.trace.inputs import keyword_inputs


def check(task: Task) -> None:
    """Raise if the model has no chain of blocks, or no number of them comes near the share, were they all alike."""
    model: Any = task.model.get_base_model()
    chain = find_blocks(model, keyword_inputs(model, task.example_inputs))
    held = [_frozen(block) for block in chain.blocks]
    if len(set(held)) == 1:  # else it depends on which ones go
        choose_blocks(torch.zeros(len(held)), held, _frozen(model), task.settings.remove)


@method("blocks", check)
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


def _frozen(model: nn.Module) -> int:
    """Return how many parameters a model has but for its adapters."""
    return sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
