"""First-order Taylor expansion in the gates."""

from __future__ import annotations

from torch import Tensor

from graphprune.saliency.gradient import mean_over_batches
from graphprune.saliency.registry import Evidence, saliency


@saliency("taylor", of_loss=True)
def taylor(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by E|∂L/∂gate|, the first-order change of the loss when its gate closes.

    Source: Molchanov et al. 2017, "Pruning Convolutional Neural Networks", eq. 7, on gates.
    """
    return mean_over_batches(evidence, Tensor.abs)
