"""Nothing is learned from gradients that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphprune.errors import TrainingError


def finite_loss(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None, step: int) -> Any:
    """Begin a step: call the closure, and check the gradients of all parameters before anything is changed.

    Args:
        optimizer: Whose step it is.
        closure: Computes the gradients anew and returns the loss; None where they are there already.
        step: Its number, to be told.

    Returns:
        The closure's loss, or None.

    Raises:
        TrainingError: If a gradient is not finite.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    greatest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
    if not bool(greatest.isfinite()):
        raise TrainingError(
            f"a gradient is not finite at step {step}; nothing was changed",
            "go on from the last checkpoint with a lower learning rate, or train in float32",
        )
    return loss
