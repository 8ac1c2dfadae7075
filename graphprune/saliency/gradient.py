"""Gradients with respect to the gates and to the adapters, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.saliency.effective import Gradients
from graphprune.saliency.registry import Evidence
from graphprune.saliency.units import AdaptedMember


def losses(evidence: Evidence) -> Iterator[Tensor]:
    """Yield the loss of each batch.

    Raises:
        TrainingError: If there is no batch, or the loss is not finite.
    """
    seen = 0
    for batch in evidence.batches:
        loss = evidence.loss(batch)
        if not bool(loss.isfinite()):
            raise TrainingError(
                f"the loss is {float(loss.detach())} before any training", "check the model and the text"
            )
        seen += 1
        yield loss
    if not seen:
        raise TrainingError(
            "the calibration set is empty", "give at least one batch (recipe: prune.calibration_windows)"
        )


def differentiable_losses(evidence: Evidence) -> Iterator[Tensor]:
    """Yield the loss of each batch.

    Raises:
        TrainingError: If there is no batch, or the loss is not finite or has no gradient.
    """
    for loss in losses(evidence):
        if not loss.requires_grad:
            raise TrainingError(
                "this saliency looks at gradients of the loss, which has none",
                "give batches with labels, or a loss; or score by wanda, flap or magnitude, which look at none",
            )
        yield loss


def gate_gradients(evidence: Evidence) -> Iterator[dict[str, Tensor]]:
    """Yield the gates' gradients of the loss for each batch.

    Raises:
        TrainingError: If there is no batch, or the loss is not finite or has no gradient.
    """
    for loss in differentiable_losses(evidence):
        loss.backward()
        yield evidence.gates.gradients()


def factor_gradients(evidence: Evidence, members: Iterable[AdaptedMember]) -> Iterator[Gradients]:
    """Yield the gradients of the loss with respect to the low-rank factors of weights, for each batch.

    Nothing else gets a gradient, and no `grad` is touched.

    Raises:
        TrainingError: If a factor is frozen, there is no batch, or the loss is not finite or has no gradient.
    """
    factors = {name: factor for member in members for name, factor in member.weight.factors().items()}
    frozen = [name for name, factor in factors.items() if not factor.requires_grad]
    if frozen:
        raise TrainingError(
            f"{frozen[0]} is frozen, and this saliency needs its gradient",
            "make it trainable: requires_grad_()",
        )
    for loss in differentiable_losses(evidence):
        found = torch.autograd.grad(loss, list(factors.values()), materialize_grads=True)
        yield dict(zip(factors, found, strict=True))


def mean_of(found: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of mappings that have the same keys."""
    total: dict[str, Tensor] = {}
    count = 0
    for entry in found:
        count += 1
        total = {name: total[name] + value if total else value for name, value in entry.items()}
    return {name: value / count for name, value in total.items()}


def mean_over_batches(evidence: Evidence, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the mean over batches of a function of the gates' gradients, by group, on the CPU."""
    return mean_of(
        {name: of(gradient).cpu() for name, gradient in gradients.items()}
        for gradients in gate_gradients(evidence)
    )
