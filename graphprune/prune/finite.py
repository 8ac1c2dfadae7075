"""Nothing is learned from gradients that are no numbers."""

from __future__ import annotations

import torch

from graphprune.errors import TrainingError


def require_finite(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Check the gradients of all parameters of an optimizer, before it changes anything.

    Raises:
        TrainingError: If one is not finite.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    greatest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
    if not bool(greatest.isfinite()):
        raise TrainingError(
            f"a gradient is not finite at step {step}; nothing was changed",
            "go on from the last checkpoint with a lower learning rate, or train in float32",
        )
