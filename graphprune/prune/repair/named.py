"""Repairs by the recipe's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import nn

from graphprune.coupling.groups import NodeGroups
from graphprune.prune.repair.activations import Calibration, Redundant
from graphprune.prune.repair.bias import Bias
from graphprune.prune.repair.least_squares import LeastSquares
from graphprune.saliency.gates import Gates
from graphprune.shrink.plan import Plan

RepairName = Literal["none", "bias", "least_squares"]


class Repair(Protocol):
    """Makes up for units that go: by stand-ins while they are gated, in the weights once they are cut."""

    def update(self, redundant: Redundant) -> None:
        """Let something stand in for the units that are redundant now."""

    def cut(self, plan: Plan, shrink: Callable[[], nn.Module]) -> nn.Module:
        """Return the smaller model, which computes by its weights alone what it did with stand-ins.

        Args:
            plan: What `shrink` removes: what was redundant at the last update.
            shrink: Cuts the model.
        """


def repair_named(
    name: RepairName, model: nn.Module, groups: NodeGroups, gates: Gates, calibration: Calibration
) -> Repair | None:
    """Return a repair that has looked at the calibration text; None for ``none``.

    Raises:
        TrainingError: If it does not fit the model, or there is too little text.
    """
    if name == "bias":
        return Bias(model, groups, gates, calibration)
    return LeastSquares(model, gates, calibration) if name == "least_squares" else None
