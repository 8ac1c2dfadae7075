"""Random scores: the control that every saliency has to beat."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from graphprune.saliency.registry import Evidence, saliency


@saliency("random")
def random(evidence: Evidence) -> dict[str, Tensor]:
    """Score units uniformly at random in [0, 1), by the evidence's seed and the group's name alone."""
    scores = {}
    for name, group in evidence.gates.groups.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), evidence.seed & 0xFFFFFFFF))
        scores[name] = torch.rand(group.size, generator=generator)
    return scores
