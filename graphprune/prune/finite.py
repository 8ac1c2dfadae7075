"""Nothing is learned from gradients that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphprune.errors import TrainingError


def finite_loss(
    optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None, step: int, *, pruning: bool
) -> Any:
    """Begin a step: call the closure, and check its loss and all gradients before anything is changed.

    Args:
        optimizer: Whose step it is.
        closure: Computes the gradients anew and returns the loss; None where they are there already.
        step: Its number, to be told.
        pruning: Whether units are judged by gradients, so that there must be some.

    Returns:
        The closure's loss, or None.

    Raises:
        TrainingError: If the loss or a gradient is not finite, or there is none to judge units by.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
        if loss is not None and not bool(torch.as_tensor(loss).isfinite().all()):
            raise _not_finite("the loss", step)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if pruning and not gradients:
        raise TrainingError(
            f"there is no gradient at step {step}; nothing was changed", "call backward() before step()"
        )
    greatest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
    if not bool(greatest.isfinite()):
        raise _not_finite("a gradient", step)
    return loss


def _not_finite(what: str, step: int) -> TrainingError:
    return TrainingError(
        f"{what} is not finite at step {step}; nothing was changed",
        "go on from the last checkpoint with a lower learning rate, or train in float32",
    )
