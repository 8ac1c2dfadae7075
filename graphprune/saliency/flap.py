"""FLAP's score: how much an input fluctuates, weighed with how strongly it is read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from graphprune.saliency.activations import Consumed, consumed_weights
from graphprune.saliency.registry import Evidence, saliency
from graphprune.saliency.units import Place, total


@saliency("flap")
def flap(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by Var(x) ‖w‖² of its consumer's columns, standardised within that weight.

    What a constant input contributes a bias can take over, so that only fluctuation counts. As in the released program,
    units of several columns (heads) are the mean of their standardised squares. Standard scores of all layers and
    kinds compare; all are shifted alike, so that the least of them is zero.

    Needs no gradient.

    Source: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning" (arXiv 2312.11983), metric WIFV.
    """
    return flap_scores(consumed_weights(evidence))


def flap_scores(weights: Iterable[Consumed]) -> dict[str, Tensor]:
    """Return the scores by group, from weights and the moments of what they read."""
    scores = total(
        (place, _standardised(consumed, place)) for consumed in weights for place in consumed.places
    )
    least = min(float(score.min()) for score in scores.values())
    return {name: score - least for name, score in scores.items()}


def _standardised(consumed: Consumed, place: Place) -> Tensor:
    """Return the mean standard score of the columns of each unit (units,)."""
    metric = consumed.moments.variance * consumed.column_sums(Tensor.square)
    columns = place.by_unit(metric.new_ones(metric.shape))
    if float(columns.max()) > 1:
        metric = metric.square()
    owned = metric[place.owner.to(metric.device) >= 0]
    standard = (metric - owned.mean()) / owned.std().clamp_min(torch.finfo(metric.dtype).tiny)
    return place.by_unit(standard) / columns
