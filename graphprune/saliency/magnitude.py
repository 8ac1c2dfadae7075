"""Magnitude of a unit's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.saliency.effective import numbers_of
from graphprune.saliency.registry import Evidence, saliency


@saliency("magnitude")
def magnitude(evidence: Evidence) -> dict[str, Tensor]:
    """Score a unit by the L2 norm of everything that goes with it, relative to the mean unit of its group.

    Looks at no data. Scores of different kinds are made comparable by the division only.
    """
    scores: dict[str, Tensor] = {}
    for name, group in evidence.gates.groups.items():
        squares = torch.zeros(group.size)
        for member in group.members:
            if member.role != "parameter":
                continue
            weight = numbers_of(evidence.model, member.parameter, member.shape).float()
            others = [axis for axis in range(weight.dim()) if axis != member.axis]
            per_index = weight.square().sum(dim=others).cpu() if others else weight.square().cpu()
            owner = torch.from_numpy(group.owner(member))
            squares.index_add_(0, owner[owner >= 0], per_index[owner >= 0])
        norms = squares.sqrt()
        scores[name] = norms / norms.mean()
    return scores
