"""The recipe's saliency of every unit that may go."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphprune.coupling.groups import NodeGroups
from graphprune.prune.budget import targets
from graphprune.prune.precision import computing_in_bfloat16, use_bfloat16
from graphprune.prune.training import Objective, logits_of
from graphprune.recipe import Prune
from graphprune.saliency.gates import Gates
from graphprune.saliency.registry import Evidence, saliency_named
from graphprune.source.text import Windows


def unit_scores(
    model: Any, groups: NodeGroups, settings: Prune, windows: Windows, *, seed: int
) -> dict[str, Tensor]:
    """Score every unit that may go on the calibration windows, drawn at random from the training text."""
    gates = Gates(model, groups, [group.name for group in targets(groups, settings.kinds)])
    ids = windows.drawn(settings.calibration_windows, seed)
    bfloat16 = use_bfloat16(settings.training, model)
    objective = Objective(logits_of(model), None, 0.0, bfloat16)
    try:
        with computing_in_bfloat16(model, bfloat16):
            evidence = Evidence(model, groups, gates, ids.split(1), objective, seed)
            return saliency_named(settings.saliency)(evidence)
    finally:
        gates.close()
