"""One training loop, for pruning and for recovery."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.prune.token_loss import token_loss
from graphprune.source.text import IGNORED, Batch

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

    def __call__(self, batch: Tensor | Batch) -> Tensor:
        """Return the loss of a batch, a scalar: the mean over the tokens that are to be learned."""
        ids, labels = (batch, batch) if isinstance(batch, Tensor) else (batch.ids, batch.labels)
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        predicted = self._rows(self.student, ids)
        if self.teacher is None or self.distill == 0:
            return token_loss(predicted, None, targets, 0.0)
        with torch.no_grad():
            wanted = self._rows(self.teacher, ids)
        return token_loss(predicted, wanted, targets, self.distill)

    def _rows(self, logits: Logits, ids: Tensor) -> Tensor:
        with _precision(self.autocast, ids):
            return logits(ids).flatten(0, 1)


def train(
    batches: Iterator[Tensor | Batch],
    objective: Callable[[Tensor | Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    warmup: int,
    trainable: list[nn.Parameter],
    observe: Callable[[], Row] | None = None,
    progress: Progress | None = None,
    first: int = 0,
    span: range | None = None,
    accumulate: int = 1,
) -> list[Row]:
    """Train for a number of steps: linear warm-up, then a cosine to a tenth, gradients clipped at norm 1.

    Under ``accelerate launch`` or torchrun, processes share the rows of every batch, and each step is the one that a
    single process would take on all of them.

    Args:
        batches: Token ids (batch, window), for ever; the same in every process.
        objective: What to minimise.
        optimizer: Its first parameter group is the one whose learning rate is scheduled.
        steps: How many the schedule has.
        warmup: Steps of the warm-up.
        trainable: Parameters whose gradients are clipped.
        observe: Further numbers for each step's metrics.
        progress: Told after each step.
        first: Number of the schedule's first step, where others came before it.
        span: Which of the steps to take now; None for all.
        accumulate: Batches of a step; their tokens count alike.

    Returns:
        One row of metrics a step: ``step``, ``loss``, ``learning_rate`` and what `observe` adds.

    Raises:
        TrainingError: As soon as the loss is not finite.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    base = optimizer.param_groups[0]["lr"]
    rows: list[Row] = []
    for step in range(first, first + steps) if span is None else span:
        optimizer.param_groups[0]["lr"] = base * _rate(step - first, steps, warmup)
        optimizer.zero_grad(set_to_none=True)
        parts = [next(batches) for _ in range(accumulate)]
        loss = _backward(parts, objective, accelerator, step)
        _sum_gradients(trainable, accelerator)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        row: Row = {
            "step": step,
            "loss": loss,
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        rows.append({**row, **(observe() if observe else {})})
        if progress:
            progress(rows[-1])
    optimizer.param_groups[0]["lr"] = base
    return rows


def _backward(
    parts: Sequence[Tensor | Batch],
    objective: Callable[[Tensor | Batch], Tensor],
    accelerator: Any,
    step: int,
) -> float:
    """Add up this process's share of the gradient of the mean over all parts' tokens; return that mean."""
    total = sum(map(_tokens, parts))
    mean = 0.0
    for part in parts:
        mine = part[accelerator.process_index :: accelerator.num_processes]
        if not len(mine):
            raise TrainingError(
                f"a batch of {len(part)} windows cannot be shared by {accelerator.num_processes} processes",
                "give larger batches (recipe: training.batch_size), or start fewer processes",
            )
        loss = objective(mine) * (_tokens(mine) / total)
        value = float(accelerator.reduce(loss.detach(), "sum"))
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {step}", "lower the learning rate, or train in float32"
            )
        accelerator.backward(loss)
        mean += value
    return mean


def _sum_gradients(trainable: Sequence[nn.Parameter], accelerator: Any) -> None:
    """Sum the gradients of all processes: of adapters these are few, so one exchange a step is enough."""
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    summed = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    sizes = [gradient.numel() for gradient in gradients]
    for parameter, part in zip(trainable, summed.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)


def _tokens(batch: Tensor | Batch) -> int:
    return batch[:, 1:].numel() if isinstance(batch, Tensor) else batch.counted


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
