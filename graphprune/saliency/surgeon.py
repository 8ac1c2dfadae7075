"""LLM Surgeon's score: what the loss rises by without a unit once those that stay have taken over what they can.

The curvature of the loss in a weight W that reads units is taken as a product of two second moments, of what it reads
and of the loss's gradient by what it puts out (K-FAC): moving W by D costs ½ tr(G D H Dᵀ). The best D that takes the
columns R away costs ½ tr(W_Rᵀ G W_R (H⁻¹_RR)⁻¹), and moves the other columns by −W_R (H⁻¹_RR)⁻¹ H⁻¹_RK, which is what
least squares folds into them. Units go in rounds, the cheapest first, and each is judged by a weight that the units
before it have left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.saliency.curvature import Curvature, curvatures
from graphprune.saliency.registry import Evidence, saliency

RIDGE = 1e-2
"""Added to H, as a share of its mean diagonal: fewer tokens than indices leave it singular."""
ROUNDS = 64
"""After so many all units are gone. In one round units go by what each costs alone."""


@saliency("surgeon")
def surgeon(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by what the loss rises by when it goes, after all that score lower and with the others refitted.

    Up to a factor of all. One second moment of each activation that is read, and of each output, is in memory.

    Source: van der Ouderaa et al. 2024, "The LLM Surgeon" (arXiv 2312.17244), in one shot: the curvature is that of the
    un-pruned model, and updates stay within the weight.
    """
    parts: dict[str, list[tuple[Curvature, Tensor]]] = {}
    for found in curvatures(evidence):
        for place in found.places:
            parts.setdefault(place.group, []).append((found, place.owner))
    return {
        name: _eliminated([_Read.of(*read) for read in reads], evidence.gates.groups[name].size)
        for name, reads in parts.items()
    }


@dataclass(frozen=True, slots=True)
class _Read:
    """What a weight makes of the units that are left, in float64.

    Attributes:
        owner: The unit of each index that it reads (indices,), or -1.
        inverse: H⁻¹, (indices, indices).
        cost: Wᵀ G W, (indices, indices).
    """

    owner: Tensor
    inverse: Tensor
    cost: Tensor

    @classmethod
    def of(cls, found: Curvature, owner: Tensor) -> _Read:
        """Return what a weight makes of all units of a group."""
        weight, inputs = found.weight.double(), found.inputs.double()
        ridge = RIDGE * inputs.diagonal().mean().clamp_min(torch.finfo(inputs.dtype).tiny)
        identity = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
        cost = weight.T @ (found.outputs.double() @ weight)
        return cls(owner.to(cost.device), torch.linalg.inv(inputs + ridge * identity), cost)

    def unit_costs(self) -> Tensor:
        """Return tr(cost_uu (H⁻¹_uu)⁻¹) of each unit that is left, in their order (units,)."""
        owned = self.owner.argsort(stable=True)[int((self.owner < 0).sum()) :]
        indices = owned.view(len(self.owner.unique()) - int((self.owner < 0).any()), -1)
        block = indices[:, :, None], indices[:, None, :]
        return torch.linalg.solve(self.inverse[block], self.cost[block]).diagonal(dim1=1, dim2=2).sum(-1)

    def without(self, units: Tensor) -> _Read:
        """Return what is left when units go and the other columns take over what they can."""
        gone = torch.isin(self.owner, units)
        stay = ~gone
        cross = self.inverse[gone][:, stay]
        taken = torch.linalg.solve(self.inverse[gone][:, gone], cross)
        moved = self.cost[stay][:, gone] @ taken - 0.5 * taken.T @ (self.cost[gone][:, gone] @ taken)
        cost = self.cost[stay][:, stay] - moved - moved.T
        return _Read(self.owner[stay], self.inverse[stay][:, stay] - cross.T @ taken, cost)


def _eliminated(reads: list[_Read], size: int) -> Tensor:
    """Return the scores (units,) of the units of a group by the weights that read them, on the CPU."""
    scores = torch.zeros(size)
    left = torch.arange(size)
    each = -(-size // ROUNDS)
    level = torch.zeros(())
    while len(left):
        costs = torch.stack([read.unit_costs().cpu() for read in reads]).sum(0).float()
        order = costs.argsort(stable=True)[:each]
        for place in order.tolist():
            # A unit that others made cheap still goes after them.
            level = torch.maximum(costs[place], torch.nextafter(level, torch.tensor(torch.inf)))
            scores[left[place]] = level
        going = left[order]
        left = left[~torch.isin(left, going)]
        if len(left):
            reads = [read.without(going.to(read.owner.device)) for read in reads]
    return scores
