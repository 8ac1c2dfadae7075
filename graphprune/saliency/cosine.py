"""Cosine between a unit's weights and where training takes them: away from zero, or towards it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.saliency.effective import Chunk
from graphprune.saliency.gradient import factor_gradients, mean_of
from graphprune.saliency.registry import Evidence, saliency
from graphprune.saliency.units import AdaptedMember, adapted_members, total, unit_sums

Direction = Callable[[Chunk], Tensor]


@saliency("cosine")
def cosine(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by cos(W, B A) + 1: what its adapters have learned stands in for the direction of descent.

    Looks at no data, but needs adapters that have been trained. A group's weights without adapters are left out.

    Source: LHSPG's importance scores in the OTO library, the program of LoRAShear (arXiv 2310.18356).

    Raises:
        TrainingError: If every update of a group is zero, as it is before training.
    """
    members = adapted_members(evidence.model, evidence.groups, evidence.gates.groups)
    return _cosines(members, lambda chunk: chunk.frozen, lambda chunk: chunk.update)


@saliency("cosine_gradient")
def cosine_gradient(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by cos(w, −g) + 1, w its weights in effect and g the surrogate of their mean gradient.

    Source: DHSPG, the ancestor of LHSPG (OTOv2, arXiv 2303.06862), with LoRAPrune's surrogate.
    """
    members = adapted_members(evidence.model, evidence.groups, evidence.gates.groups)
    gradients = mean_of(factor_gradients(evidence, members))
    return _cosines(members, lambda chunk: chunk.effective, lambda chunk: -chunk.surrogate(gradients))


def _cosines(members: list[AdaptedMember], weight: Direction, direction: Direction) -> dict[str, Tensor]:
    def products(chunk: Chunk) -> Tensor:
        first, second = weight(chunk), direction(chunk)
        return torch.stack((first * second, first.square(), second.square()))

    scores = {}
    for name, (inner, first, second) in total(unit_sums(members, products)).items():
        if not bool(second.any()):
            raise TrainingError(
                f"the adapters in '{name}' move none of its weights, so that there is no direction to compare with",
                "train the adapters first, or use cosine_gradient",
            )
        norms = (first.sqrt() * second.sqrt()).clamp_min(torch.finfo(inner.dtype).tiny)
        scores[name] = (inner / norms).clamp(-1, 1) + 1
    return scores
