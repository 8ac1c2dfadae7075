"""One training loop, for pruning and for recovery."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError

Logits = Callable[[Tensor], Tensor]
Row = dict[str, Any]


class Progress(Protocol):
    """Told after each step."""

    def __call__(self, row: Row) -> None:
        """Take the metrics of the step just done."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: next-token loss, and the distance from a teacher's predictions.

    Attributes:
        student: From token ids (batch, window) to logits.
        teacher: Likewise, without gradients; None to learn from the text alone.
        distill: Weight of KL(teacher ‖ student), per token, in nats.
        autocast: Whether to compute in bfloat16.
    """

    student: Logits
    teacher: Logits | None
    distill: float
    autocast: bool

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar."""
        with _precision(self.autocast, ids):
            predicted = self.student(ids)[:, :-1].flatten(0, 1).float().log_softmax(-1)
        loss = nn.functional.nll_loss(predicted, ids[:, 1:].flatten())
        if self.teacher is None or self.distill == 0:
            return loss
        with torch.no_grad():
            with _precision(self.autocast, ids):
                wanted = self.teacher(ids)[:, :-1].flatten(0, 1).float().log_softmax(-1)
            probability = wanted.exp()
            entropy = -(probability * wanted).sum()
        divergence = -((probability * predicted).sum() + entropy) / len(predicted)
        return loss + self.distill * divergence


def train(
    batches: Iterator[Tensor],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    warmup: int,
    trainable: list[nn.Parameter],
    observe: Callable[[], Row] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Train for a number of steps: linear warm-up, then a cosine to a tenth, gradients clipped at norm 1.

    Args:
        batches: Token ids (batch, window), for ever.
        objective: What to minimise.
        optimizer: Its first parameter group is the one whose learning rate is scheduled.
        steps: How many.
        warmup: Steps of the warm-up.
        trainable: Parameters whose gradients are clipped.
        observe: Further numbers for each step's metrics.
        progress: Told after each step.

    Returns:
        One row of metrics a step: ``step``, ``loss``, ``learning_rate`` and what `observe` adds.

    Raises:
        TrainingError: As soon as the loss is not finite.
    """
    base = optimizer.param_groups[0]["lr"]
    rows: list[Row] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = base * _rate(step, steps, warmup)
        optimizer.zero_grad(set_to_none=True)
        loss = objective(next(batches))
        if not bool(loss.isfinite()):
            raise TrainingError(
                f"the loss became {float(loss.detach())} at step {step}",
                "lower the learning rate, or train in float32",
            )
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        row: Row = {
            "step": step,
            "loss": float(loss.detach()),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        rows.append({**row, **(observe() if observe else {})})
        if progress:
            progress(rows[-1])
    optimizer.param_groups[0]["lr"] = base
    return rows


def logits_of(model: nn.Module) -> Logits:
    """Return the logits function of a causal language model, with gradients."""

    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    return logits


def _precision(autocast: bool, ids: Tensor) -> Any:
    return torch.autocast(ids.device.type, dtype=torch.bfloat16) if autocast else nullcontext()


def _rate(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
