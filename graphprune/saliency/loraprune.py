"""LoRAPrune's importance (arXiv 2305.18403), as published and as released."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from graphprune.saliency.effective import Gradients
from graphprune.saliency.gradient import factor_gradients, mean_of
from graphprune.saliency.registry import Evidence, saliency
from graphprune.saliency.units import AdaptedMember, adapted_members, total, unit_sums


def importance(
    members: Iterable[AdaptedMember], gradients: Gradients, *, released: bool = False
) -> dict[str, Tensor]:
    """Score every unit by one step's gradients of the adapters.

    With Ĝ in place of the gradient, an element of the weight in effect counts (Ĝ w)² as published. The released
    program takes |Ĝ w| instead, and divides the units' sums within each weight by their L2 norm before it adds up the
    weights of a group.

    Args:
        members: The weights with adapters, from `adapted_members`.
        gradients: Of their factors.
        released: Whether to compute as the released program does.

    Returns:
        Scores (units,) by group.
    """
    if not released:
        return total(
            unit_sums(members, lambda chunk: (chunk.effective * chunk.surrogate(gradients)).square())
        )
    sums = unit_sums(members, lambda chunk: (chunk.effective * chunk.surrogate(gradients)).abs())
    return total((place, part / (part.norm() + 1e-8)) for place, part in sums)


@saliency("loraprune")
def loraprune(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by the mean over batches of LoRAPrune's published importance.

    In training the importance is a moving average over steps; over a calibration set, where no step is later than
    another, it is the mean. So taken it is the second-order Taylor term, and equals ``taylor_second``.
    """
    return _mean_importance(evidence, released=False)


@saliency("loraprune_released")
def loraprune_released(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by the mean over batches of the importance that LoRAPrune's program computes."""
    return _mean_importance(evidence, released=True)


def _mean_importance(evidence: Evidence, *, released: bool) -> dict[str, Tensor]:
    members = adapted_members(evidence.model, evidence.groups, evidence.gates.groups)
    return mean_of(
        importance(members, gradients, released=released) for gradients in factor_gradients(evidence, members)
    )
