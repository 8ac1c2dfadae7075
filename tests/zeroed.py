"""The reference that surgery is held to: the model as it was, its removed units set to zero."""

from __future__ import annotations

import copy

import torch

from graphprune.shrink.weights import zero_weight


def zeroed(model, groups, plan):
    """Return a copy of a model whose parameters are zero where a plan removes units."""
    twin, kept = copy.deepcopy(model), plan.kept(groups)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(zero_weight(name, parameter, groups, kept))
    return twin
