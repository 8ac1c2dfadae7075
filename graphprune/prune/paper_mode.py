"""LHSPG's paper mode: redundant units' own weights decay to zero, as LoRAShear has it (arXiv 2310.18356).

Algorithm 4 and equation 2. In each step of a period, after the adapters' own,

    x̃ = x + γ s BA − λ x/‖x‖   on the redundant units,

x̃ is projected to zero where ⟨x̃, x⟩ ≤ ε‖x‖², and B of the redundant units set to zero. Once a period BA of all that
is important is merged. x is all that a unit owns of what produces it: its rows of the weights in front of it, with
biases and whatever else carries the unit; columns of the weights that read it then read zeros. The base changes from
the first period on, so that with adapters off it is no longer the un-pruned model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from graphprune.coupling.node_group import Member, NodeGroup
from graphprune.errors import TrainingError
from graphprune.prune.low_rank import AdaptedWeight, adapted_weights
from graphprune.prune.param_groups import ParameterGroups
from graphprune.prune.unit_rows import (
    UnitRows,
    gradient_product,
    squared_norm,
    squared_update,
    sum_by_unit,
    update_product,
)

Penalty = Callable[[Tensor, int], Tensor]
Saliency = Literal["taylor", "magnitude", "cosine"]


def linear_penalty(norm: Tensor, steps_left: int) -> Tensor:
    """Return λ = ‖x‖ / (steps left), by which x goes to zero on a straight line, up to what BA adds."""
    return norm / steps_left


@dataclass(frozen=True, slots=True)
class PaperChoices:
    """What the paper leaves open. The numbers of steps and ε are arguments of `LHSPG`.

    Attributes:
        saliency: ``taylor``: |⟨x, s (∂B A + B ∂A)⟩|, the first-order change of the loss as far as LoRA's gradients
            know it; ``magnitude``: ‖x‖; ``cosine``: 1 + cos(x, s BA), BA standing in for the gradient's direction as
            in OTO's code.
        gamma: γ. At 1, BA moves into x without a change of what the layer computes.
        penalty: λ by the norms (units,) and the steps left of the period. Whatever it is, the last step of a period
            leaves zeros, so that the target is met.
        forget: Whether AdamW's moments of B start afresh when B does, after a merge.

    Raises:
        TrainingError: If there is no such saliency.
    """

    saliency: Saliency = "taylor"
    gamma: float = 1.0
    penalty: Penalty = linear_penalty
    forget: bool = True

    def __post_init__(self) -> None:
        if self.saliency not in (known := get_args(Saliency)):
            raise TrainingError(
                f"LHSPG's paper mode has no saliency '{self.saliency}'", f"there are {', '.join(known)}"
            )


class PaperMode:
    """Equation 2 on weights, vectorised over the units of a group; BA is never whole in memory.

    Merging writes to every weight that has an adapter, so the optimizer's state holds them all.

    Args:
        params: A model with plain LoRA adapters, which its graph shows, with its groups.
        names: Groups that lose units.
        choices: What the paper leaves open.
        forget: Drops a parameter's moments.

    Raises:
        TrainingError: If adapters are not plain LoRA, weights are quantized, or gradients say nothing of a group.
    """

    def __init__(
        self,
        params: ParameterGroups,
        names: Iterable[str],
        choices: PaperChoices,
        forget: Callable[[nn.Parameter], None],
    ) -> None:
        self.parameters: list[nn.Parameter] = []
        self._choices = choices
        self._forget = forget
        self._updates = adapted_weights(params.model, params.groups.graph)
        self._parts = {name: _parts(params, params.groups[name], self._updates) for name in names}
        self._zeroed = {
            name: torch.zeros(params.groups[name].size, dtype=torch.bool, device=parts[0].weight.device)
            for name, parts in self._parts.items()
        }
        for name, parts in self._parts.items():
            if choices.saliency != "magnitude" and all(part.update is None for part in parts):
                raise TrainingError(
                    f"no weight that produces the units of '{name}' has an adapter, so LoRA says nothing of them",
                    "attach adapters there, or use PaperChoices(saliency='magnitude')",
                )

    def observe(self) -> dict[str, Tensor]:
        """Return the saliency of all units by what the gradients and factors are now."""
        return {
            name: self._saliency(parts, torch.ones_like(self._zeroed[name]))
            for name, parts in self._parts.items()
        }

    def fade(self, redundant: Mapping[str, Tensor], steps_left: int, half_space: float) -> None:
        """Take one step of equation 2 on redundant units, and project."""
        for name, parts in self._parts.items():
            units = redundant[name] & ~self._zeroed[name]
            squared = sum_by_unit(parts, units, squared_norm)
            norm = squared.sqrt()
            penalty = self._choices.penalty(norm, steps_left)
            aligned = self._choices.gamma * sum_by_unit(parts, units, update_product)
            leaves = squared + aligned - penalty * norm <= half_space * squared
            gone = units & (leaves if steps_left > 1 else torch.ones_like(leaves))
            shrink = 1 - penalty / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            for part in parts:
                self._move(part, units & ~gone, shrink)
                part.clear(gone)
                part.clear_update(
                    redundant[name]
                )  # of those long gone too: the optimizer moved B, and a merge follows
            self._zeroed[name] |= gone

    def end_period(self) -> None:
        """Merge BA into every weight that has an adapter; B of redundant units is zero already."""
        if not self._parts:
            return
        for update in self._updates:
            update.merge()
            if self._choices.forget:
                self._forget(update.b)

    def hold(self) -> None:
        """Set B, and what else trains, of units that are gone to zero again."""
        for name, parts in self._parts.items():
            for part in parts:
                part.clear_update(self._zeroed[name])
                if part.weight.requires_grad:
                    part.clear(self._zeroed[name])

    def zeroed(self) -> dict[str, Tensor]:
        """Return which units are gone."""
        return dict(self._zeroed)

    def tensors(self) -> dict[str, Tensor]:
        """Return which units are gone, and every weight that is written to."""
        if not self._parts:
            return {}
        weights = {id(update.weight): update.weight.data for update in self._updates}
        for parts in self._parts.values():
            weights.update({id(part.weight): part.weight.data for part in parts})
        # In the order of the model's modules and groups, which a model made again has too.
        numbered = {f"weight {number}": weight for number, weight in enumerate(weights.values())}
        return {**{f"zeroed {name}": mask for name, mask in self._zeroed.items()}, **numbered}

    def close(self) -> None:
        """The model carries nothing to let go of."""

    def _saliency(self, parts: tuple[UnitRows, ...], units: Tensor) -> Tensor:
        if self._choices.saliency == "taylor":
            return sum_by_unit(parts, units, gradient_product).abs()
        norm = sum_by_unit(parts, units, squared_norm).sqrt()
        if self._choices.saliency == "magnitude":
            return norm
        product = sum_by_unit(parts, units, update_product)
        other = sum_by_unit(parts, units, squared_update).sqrt()
        return 1 + product / (norm * other).clamp_min(torch.finfo(norm.dtype).tiny)

    def _move(self, part: UnitRows, units: Tensor, shrink: Tensor) -> None:
        """Write x (1 − λ/‖x‖) + γ s BA to the rows of some units."""
        for rows in part.chunks(units):
            x = part.read(rows)
            faded = x * shrink[part.owner[rows]].to(x.dtype)[:, None]
            part.write(rows, part.moved(faded, rows, self._choices.gamma))


def _parts(
    params: ParameterGroups, group: NodeGroup, updates: Iterable[AdaptedWeight]
) -> tuple[UnitRows, ...]:
    """Return what a group's units own: all that produces or carries them, but for LoRA's factors."""
    by_weight = {id(update.weight): update for update in updates}
    factors = {id(factor) for update in by_weight.values() for factor in (update.a, update.b)}
    parts = []
    for member in group.members:
        if member.role != "parameter" or member.side == "consumes":
            continue
        weight = params.model.get_parameter(member.parameter)
        if id(weight) not in factors:
            parts.append(_part(weight, group, member, by_weight.get(id(weight))))
    if not parts:
        raise TrainingError(
            f"no weight produces the units of '{group.name}', so there is nothing to fade",
            "use mode='gated', or leave this kind out of param_groups(kinds=...)",
        )
    return tuple(parts)


def _part(weight: nn.Parameter, group: NodeGroup, member: Member, update: AdaptedWeight | None) -> UnitRows:
    if not weight.is_floating_point():
        raise TrainingError(
            f"LHSPG's paper mode cannot write to {member.parameter}, which is stored as {weight.dtype}",
            "use mode='gated', which leaves weights alone",
        )
    if update is None and weight.requires_grad and weight.dim() > 1:
        raise TrainingError(
            f"{member.parameter} trains, and is no factor of W x + s BA x in the model as traced",
            "use plain LoRA adapters on frozen weights",
        )
    if update is not None and member.axis != int(update.transposed):
        raise TrainingError(
            f"the units of '{group.name}' lie along the inputs of {member.parameter}, which B has no rows for",
            "leave this kind out of param_groups(kinds=...)",
        )
    return UnitRows(weight, member.axis, torch.from_numpy(group.owner(member)).to(weight.device), update)
