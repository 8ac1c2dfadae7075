"""LHSPG's gated mode: one scalar for each unit, on its contribution, decays to zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from graphprune.prune.param_groups import ParameterGroups
from graphprune.saliency.gates import Gates


class GatedMode:
    """Equation 2 on gates: x̃ = x − λ x/‖x‖ with x a unit's gate.

    Adapters need no place in it: they act on the important units, which is where the knowledge goes.

    Args:
        params: The model with its groups.
        names: Groups to gate.

    Attributes:
        gates: Gates on the model.
        parameters: Their values.
    """

    def __init__(self, params: ParameterGroups, names: Iterable[str]) -> None:
        self.gates = Gates(params.model, params.groups, names)
        self.parameters = list(self.gates.values.values())

    def observe(self) -> dict[str, Tensor]:
        """Return squared gate gradients (empirical Fisher information), all processes' mean, and clear them."""
        gradients = self.gates.gradients()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for gradient in gradients.values():  # gates are not the wrapped model's: it does not average them
                torch.distributed.all_reduce(gradient)
                gradient.div_(torch.distributed.get_world_size())
        return {name: gradient.square() for name, gradient in gradients.items()}

    def fade(self, redundant: Mapping[str, Tensor], steps_left: int, half_space: float) -> None:
        """Take λ = x / (steps left) off redundant gates and project those that leave the half-space."""
        for name, gate in self.gates.values.items():
            value = gate.data
            trial = value - value / steps_left
            gone = trial * value <= half_space * value.square()
            faded = torch.where(gone, torch.zeros_like(trial), trial)
            value.copy_(torch.where(redundant[name], faded, value))

    def end_period(self) -> None:
        """Nothing is merged: the base stays as it is."""

    def hold(self) -> None:
        """Nothing moves gates but `fade`."""

    def zeroed(self) -> dict[str, Tensor]:
        """Return which gates are exactly zero."""
        return {name: gate.detach() == 0 for name, gate in self.gates.values.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the gates."""
        return {name: gate.data for name, gate in self.gates.values.items()}

    def close(self) -> None:
        """Take the gates off the model."""
        self.gates.close()
