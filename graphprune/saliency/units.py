"""From elements of weights to units: sums along rows or columns, then over what each unit owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import TrainingError
from graphprune.saliency.effective import Chunk, EffectiveWeight, effective_weights

Elements = Callable[[Chunk], Tensor]
"""From rows of a weight to numbers of the same shape (…, rows, in)."""
Scores = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group has units in a weight.

    Attributes:
        group: Its name.
        size: Its number of units.
        by_input: Whether they lie along the weight's input, as columns.
        owner: The unit of each index, or -1.
    """

    group: str
    size: int
    by_input: bool
    owner: Tensor

    def by_unit(self, per_index: Tensor) -> Tensor:
        """Add up numbers (…, indices) into units (…, units), on the CPU."""
        per_index = per_index.cpu()
        owned = self.owner >= 0
        sums = per_index.new_zeros(*per_index.shape[:-1], self.size)
        return sums.index_add_(-1, self.owner[owned], per_index[..., owned])


@dataclass(frozen=True, slots=True)
class AdaptedMember:
    """A weight that carries adapters, with all places that gated groups have in it."""

    weight: EffectiveWeight
    places: tuple[Place, ...]


def adapted_members(model: nn.Module, groups: NodeGroups, names: Iterable[str]) -> list[AdaptedMember]:
    """Return the weights with adapters that groups reach; those without have no gradient to judge by.

    Args:
        model: The model.
        groups: Its node groups.
        names: The groups to score.

    Raises:
        TrainingError: If none of a group's weights has adapters.
    """
    weights = effective_weights(model, groups)
    places: dict[str, list[Place]] = {}
    for group in (groups[name] for name in names):
        adapted = [member for member in group.members if member.parameter in weights]
        if not adapted:
            raise TrainingError(
                f"none of the weights of '{group.name}' carries a low-rank adapter, whose gradient this saliency needs",
                "attach adapters to them, leave this kind out of kinds (recipe: prune.kinds), or use fisher or taylor",
            )
        for member in adapted:
            by_input = member.axis == weights[member.parameter].input_axis
            place = Place(group.name, group.size, by_input, torch.from_numpy(group.owner(member)))
            places.setdefault(member.parameter, []).append(place)
    return [AdaptedMember(weights[name], tuple(found)) for name, found in places.items()]


def unit_sums(
    members: Iterable[AdaptedMember], elements: Elements, of_sums: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[Place, Tensor]]:
    """Yield, for each place in each weight, the sums of elements that its units own (…, units).

    Args:
        members: The weights.
        elements: What is added up.
        of_sums: Applied to the sum of each row or column, before units add those up.
    """
    for member in members:
        sums = _sums(member.weight, elements)
        for place in member.places:
            per_index = sums[place.by_input]
            yield place, place.by_unit(of_sums(per_index) if of_sums else per_index)


def total(parts: Iterable[tuple[Place, Tensor]]) -> Scores:
    """Add up what the places of each group have, in float32."""
    scores: Scores = {}
    for place, part in parts:
        scores[place.group] = scores[place.group] + part if place.group in scores else part
    return {name: score.float() for name, score in scores.items()}


def _sums(weight: EffectiveWeight, elements: Elements) -> tuple[Tensor, Tensor]:
    """Return the sum of each row and of each column."""
    by_row: list[Tensor] = []
    by_column = torch.zeros(())
    for chunk in weight.chunks():
        found = elements(chunk)
        by_row.append(found.sum(-1))
        by_column = by_column + found.sum(-2)
    return torch.cat(by_row, -1), by_column
