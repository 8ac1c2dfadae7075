"""Wanda's score, for structures."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from graphprune.saliency.activations import Consumed, consumed_weights
from graphprune.saliency.registry import Evidence, saliency
from graphprune.saliency.units import total


@saliency("wanda")
def wanda(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by Σ |w| ‖x‖ over what it owns of its consumers, ‖x‖ over all calibration tokens.

    Needs no gradient.

    Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for LLMs", eq. 1; summed into structures as
    Wanda-sp in An et al. 2024, "Fluctuation-based Adaptive Structured Pruning".
    """
    return wanda_scores(consumed_weights(evidence))


def wanda_scores(weights: Iterable[Consumed]) -> dict[str, Tensor]:
    """Return the scores by group, from weights and the moments of what they read."""
    return total(
        (place, place.by_unit(consumed.column_sums(Tensor.abs) * consumed.moments.norm))
        for consumed in weights
        for place in consumed.places
    )
