"""Taylor expansions of the loss in the weights themselves, from the gradients of adapters alone.

These are LLM-Pruner's (arXiv 2305.11627, section 3.2): elements w of every coupled weight with their gradient g and the
diagonal of the empirical Fisher matrix, H = E[g²] over samples, added up into units. Here w is the weight in effect and
g the surrogate that the adapters' gradients give, so that no gradient of a whole weight is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.saliency.effective import Chunk
from graphprune.saliency.gradient import factor_gradients, mean_of
from graphprune.saliency.loraprune import importance
from graphprune.saliency.registry import Evidence, saliency
from graphprune.saliency.units import adapted_members, total, unit_sums


@saliency("taylor_first")
def taylor_first(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by Σ |w g|, g being the gradient of the mean loss ("element, first order")."""
    members = adapted_members(evidence.model, evidence.groups, evidence.gates.groups)
    gradient = mean_of(factor_gradients(evidence, members))
    return total(unit_sums(members, lambda chunk: (chunk.effective * chunk.surrogate(gradient)).abs()))


@saliency("taylor_vector", of_loss=True)
def taylor_vector(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by Σ |Σ w g|, the inner sum over each row or column that it owns ("vector")."""
    members = adapted_members(evidence.model, evidence.groups, evidence.gates.groups)
    gradient = mean_of(factor_gradients(evidence, members))
    return total(unit_sums(members, lambda chunk: chunk.effective * chunk.surrogate(gradient), torch.abs))


@saliency("taylor_second")
def taylor_second(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by Σ w² H, H from one sample a batch ("element, second order")."""
    members = adapted_members(evidence.model, evidence.groups, evidence.gates.groups)
    return mean_of(importance(members, gradients) for gradients in factor_gradients(evidence, members))


@saliency("taylor_mix")
def taylor_mix(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by Σ |w g − ½ w² H| ("mix"), the rise of the loss that both orders foresee.

    The absolute value wants H whole, so the adapters' gradients of all batches are held together.
    """
    members = adapted_members(evidence.model, evidence.groups, evidence.gates.groups)
    gradients = list(factor_gradients(evidence, members))
    mean = mean_of(gradients)

    def elements(chunk: Chunk) -> Tensor:
        fisher = torch.zeros_like(chunk.frozen)
        for gradient in gradients:
            fisher += chunk.surrogate(gradient).square() / len(gradients)
        weight = chunk.effective
        return (weight * chunk.surrogate(mean) - weight.square() * fisher / 2).abs()

    return total(unit_sums(members, elements))
