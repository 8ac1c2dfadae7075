"""Scoring the units of a tiny model."""

from __future__ import annotations

import torch
from tiny_models import Traced

from graphprune.prune.training import Objective, logits_of
from graphprune.saliency.gates import Gates
from graphprune.saliency.registry import Evidence, saliency_named

KINDS = ("ffn", "attention_heads")
# The second sequence repeats itself, so that batches differ in more than their tokens.
IDS = torch.stack((torch.arange(12) * 5 % 60 + 3, torch.arange(12) % 3 + 9, torch.arange(12) * 7 % 60 + 3))
BATCHES = IDS.split(1)


def score(
    traced: Traced, name: str, *, model=None, batches=BATCHES, kinds=KINDS, seed=0, scale=1.0
) -> dict[str, torch.Tensor]:
    """Score units by the saliency of that name; `model` stands in for the traced one, `scale` multiplies the loss."""
    model = traced.model if model is None else model
    objective = Objective(logits_of(model), None, 0.0, False)
    gates = Gates(model, traced.groups, [group for kind in kinds for group in traced.of_kind(kind)])
    try:
        evidence = Evidence(model, traced.groups, gates, batches, lambda ids: scale * objective(ids), seed)
        return saliency_named(name)(evidence)
    finally:
        gates.close()
