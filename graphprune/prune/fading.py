"""What a mode of LHSPG is: how redundant units reach zero, and what says which units should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn


class Fading(Protocol):
    """One way to take units away step by step.

    Attributes:
        parameters: What joins the optimizer's parameter groups, so that ``zero_grad`` and loss scalers reach it.
    """

    parameters: list[nn.Parameter]

    def observe(self) -> dict[str, Tensor]:
        """Return each unit's saliency (units,) by this step's gradients, larger meaning keep, by group."""

    def fade(self, redundant: Mapping[str, Tensor], steps_left: int, half_space: float) -> None:
        """Bring redundant units (masks, by group) closer to zero.

        Args:
            redundant: Masks (units,) by group.
            steps_left: Steps left of the period, this one counted; at 1 all of them end at exactly zero.
            half_space: ε of the projection.
        """

    def end_period(self) -> None:
        """Do what is due once a period, after its last step."""

    def hold(self) -> None:
        """Keep at zero what is at zero, after a step of the adapters."""

    def zeroed(self) -> dict[str, Tensor]:
        """Return masks (units,) of the units that are exactly zero, by group."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all that fading changes, by name: the tensors themselves, for saving and for loading into."""

    def close(self) -> None:
        """Let go of the model."""
