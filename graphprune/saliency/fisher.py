"""Empirical Fisher information of the gates."""

from __future__ import annotations

from torch import Tensor

from graphprune.saliency.gradient import mean_over_batches
from graphprune.saliency.registry import Evidence, saliency


@saliency("fisher", of_loss=True)
def fisher(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by E[(∂L/∂gate)²], the curvature of the loss along its gate.

    Closing a gate moves it by one, so at a trained model, where first-order terms average out, half this number
    estimates the rise of the loss, in the same unit for all kinds of groups.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8, on gates.
    """
    return mean_over_batches(evidence, Tensor.square)
