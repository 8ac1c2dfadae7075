"""Scores made comparable across kinds of units, so that none starves another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from graphprune.coupling.groups import NodeGroup


def normalised_by_kind(
    scores: Mapping[str, Tensor], groups: Iterable[NodeGroup], cost: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """Scale the scores of each kind so that its units are worth their cost on average: Σ score = Σ cost.

    A head holds hundreds of times the parameters of a channel, and its score has another size, or even another unit of
    measure. Ranked by score per cost afterwards, each kind loses its own least units, and the order within a
    kind, across all its layers, stays as it was. Where a kind has scores below zero, its least becomes zero first.

    Args:
        scores: Scores (units,), by group name.
        groups: The groups that have scores.
        cost: What one unit costs, by group name; its parameters by default.

    Returns:
        Scores (units,) by group name; a kind whose scores are all zero stays as it is.
    """
    kinds: dict[str, list[NodeGroup]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    normalised = {}
    for same in kinds.values():
        least = min(0.0, *(float(scores[group.name].min()) for group in same))
        shifted = {group.name: scores[group.name] - least for group in same}
        worth = sum(float(score.double().sum()) for score in shifted.values())
        costs = sum(group.size * (cost[group.name] if cost else group.parameters_per_unit) for group in same)
        factor = costs / worth if worth > 0 else 1.0
        normalised.update({name: score * factor for name, score in shifted.items()})
    return normalised
