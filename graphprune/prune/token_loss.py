"""Next-token loss and distillation over a large vocabulary, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graphprune.source.text import IGNORED

CHUNK = 1 << 20
"""Logits in work at a time: 4 MB in float32, so that passes over them stay in a processor's cache."""


def token_loss(student: Tensor, teacher: Tensor | None, targets: Tensor, distill: float) -> Tensor:
    """Return the mean over learned tokens of ``-log p(target) + distill KL(teacher ‖ student)``, in nats.

    A language model's logits outweigh the rest of its activations. Written with ``log_softmax`` they would be held
    some eight times over in float32; here the loss and its gradient are made together, a few rows at a time, and
    only the gradient is kept, in the logits' own type.

    Args:
        student: Logits (tokens, vocabulary).
        teacher: Likewise, without a gradient; None to learn from the targets alone.
        targets: (tokens,) token ids, `IGNORED` where a row is not learned.
        distill: Weight of the divergence.

    Returns:
        A scalar in float32, or float64 if the logits are; NaN if no token is learned. Differentiable once.
    """
    loss: Tensor = _TokenLoss.apply(student, teacher if distill else None, targets, distill)
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, distill: float) -> Tensor:
        exact = torch.promote_types(student.dtype, torch.float32)
        learned = (targets != IGNORED).nonzero()[:, 0]
        gradient = torch.zeros_like(student) if student.requires_grad else None
        total = student.new_zeros((), dtype=exact)
        for rows in learned.split(max(1, CHUNK // student.shape[-1])):
            predicted = student[rows].to(exact).log_softmax(-1)
            wanted = None if teacher is None else teacher[rows].to(exact).log_softmax(-1)
            total -= predicted.gather(-1, targets[rows, None]).sum()
            if wanted is not None:
                total += distill * (wanted.exp() * (wanted - predicted)).sum()
            if gradient is not None:
                gradient[rows] = (
                    _slope(predicted, wanted, targets[rows], distill).div_(len(learned)).to(student.dtype)
                )
        ctx.save_for_backward(gradient)
        return total / len(learned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0].to(slope.dtype), None, None, None


def _slope(predicted: Tensor, wanted: Tensor | None, targets: Tensor, distill: float) -> Tensor:
    """Return the gradient of the summed loss by the logits: ``p - target + distill (p - teacher's p)``."""
    slope = predicted.exp()
    if wanted is not None:
        slope.mul_(1 + distill).sub_(wanted.exp(), alpha=distill)
    minus_one = slope.new_full((), -1.0).expand(len(targets), 1)
    return slope.scatter_add_(-1, targets[:, None], minus_one)
