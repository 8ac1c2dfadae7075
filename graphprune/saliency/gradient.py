"""Gradients with respect to the gates, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.saliency.registry import Evidence


def gate_gradients(evidence: Evidence) -> Iterator[dict[str, Tensor]]:
    """Yield the gates' gradients of the loss for each batch.

    Raises:
        TrainingError: If there is no batch, or the loss is not finite.
    """
    seen = 0
    for batch in evidence.batches:
        loss = evidence.loss(batch)
        if not bool(loss.isfinite()):
            raise TrainingError(
                f"the loss is {float(loss)} before any training", "check the model and the text"
            )
        loss.backward()
        seen += 1
        yield evidence.gates.gradients()
    if not seen:
        raise TrainingError("the calibration set is empty", "raise prune.calibration_windows")


def mean_over_batches(evidence: Evidence, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the mean over batches of a function of the gates' gradients, by group."""
    total: dict[str, Tensor] = {}
    count = 0
    for count, gradients in enumerate(gate_gradients(evidence), start=1):
        for name, gradient in gradients.items():
            total[name] = of(gradient) if count == 1 else total[name] + of(gradient)
    return {name: score / count for name, score in total.items()}
