"""Wanda's score, for structures."""

from __future__ import annotations

from torch import Tensor

from graphprune.saliency.activations import consumed_weights
from graphprune.saliency.registry import Evidence, saliency
from graphprune.saliency.units import total


@saliency("wanda")
def wanda(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by Σ |w| ‖x‖ over what it owns of its consumers, ‖x‖ over all calibration tokens.

    Needs no gradient.

    Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for LLMs", eq. 1; summed into structures as
    Wanda-sp in An et al. 2024, "Fluctuation-based Adaptive Structured Pruning".
    """
    return total(
        (place, place.by_unit(consumed.column_sums(Tensor.abs) * consumed.moments.norm))
        for consumed in consumed_weights(evidence)
        for place in consumed.places
    )
