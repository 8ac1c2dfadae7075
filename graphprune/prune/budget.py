"""From a share of parameters to a number of units for each group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from graphprune.coupling.groups import NodeGroup, NodeGroups
from graphprune.errors import BudgetError, NothingPrunableError, RecipeError

_MOST_CHOICES = 200_000


@dataclass(frozen=True, slots=True)
class Budget:
    """How many units each group loses.

    Attributes:
        removed_units: By group name.
        before: Parameters of the model.
        after: Parameters that stay.
        asked: The share that was asked for.
    """

    removed_units: Mapping[str, int]
    before: int
    after: int
    asked: float

    @property
    def removed_share(self) -> float:
        """The share of parameters that goes."""
        return 1 - self.after / self.before


@dataclass(frozen=True, slots=True)
class _Family:
    """Groups of one kind and size, which lose the same number of units: a uniform layout."""

    names: tuple[str, ...]
    size: int
    choices: tuple[int, ...]
    cost_of: tuple[float, ...]


def targets(groups: NodeGroups, kinds: Collection[str]) -> list[NodeGroup]:
    """Return the prunable groups of the given kinds.

    Raises:
        RecipeError: If a kind names no group at all.
        NothingPrunableError: If none of the groups may be pruned; lists the reasons.
    """
    present = {group.kind for group in groups.values()}
    for kind in kinds:
        if kind not in present:
            raise RecipeError(f"no group is of kind '{kind}'", f"this model has {', '.join(sorted(present))}")
    of_kind = [group for group in groups.values() if group.kind in kinds]
    prunable = [group for group in of_kind if group.prunable]
    if not prunable:
        reasons = sorted({f"{group.kind}: {group.reason}" for group in of_kind})
        raise NothingPrunableError(
            f"none of the {len(of_kind)} groups of kind {', '.join(kinds)} may be pruned:\n    "
            + "\n    ".join(reasons),
            "choose other kinds, or give the operators named above a rule",
        )
    return prunable


def uniform_budget(
    groups: NodeGroups,
    chosen: Collection[NodeGroup],
    scores: Mapping[str, Tensor],
    *,
    remove: float,
    width_multiple: Mapping[str, int],
    counted: Collection[str],
) -> Budget:
    """Share a budget of parameters out among groups, with one width for all groups of a kind and size.

    Stock model classes know one width for all layers, so a uniform layout loads everywhere. Of all layouts within
    half a step of the target (a step being the least that any family can lose) the one that loses the least
    saliency is taken.

    Args:
        groups: The node groups.
        chosen: Those that may lose units.
        scores: Saliency of each unit, (units,), by group name.
        remove: The share of parameters to remove, 0 to 1.
        width_multiple: Kept units are a multiple of this, by kind.
        counted: Names of the parameters that count.

    Raises:
        BudgetError: If no layout comes within a step of the target.
    """
    families = _families(chosen, scores, width_multiple)
    before = _count(groups, counted, {})
    table = [(_after(groups, counted, families, choice), choice) for choice in _choices(families)]
    steps = [before - after for after, _ in table if after < before]
    if not steps:
        raise BudgetError(
            f"no group can lose a unit and keep a multiple of {dict(width_multiple)}",
            "lower prune.width_multiple",
        )
    step, goal = min(steps), before * (1 - remove)
    near = [entry for entry in table if abs(entry[0] - goal) <= step / 2 and entry[0] < before]
    if not near:
        nearest = min((after for after, _ in table if after < before), key=lambda after: abs(after - goal))
        if abs(nearest - goal) > step:
            raise BudgetError(
                f"{remove:.1%} of the parameters cannot be removed from {', '.join(sorted({g.kind for g in chosen}))}"
                f"; the nearest is {1 - nearest / before:.1%}",
                "ask for that, or allow more kinds",
            )
        near = [entry for entry in table if entry[0] == nearest]
    after, choice = min(near, key=lambda entry: (_lost(families, entry[1]), abs(entry[0] - goal)))
    removed = {
        name: count for family, count in zip(families, choice, strict=True) for name in family.names if count
    }
    return Budget(removed, before, after, remove)


def _families(
    chosen: Collection[NodeGroup], scores: Mapping[str, Tensor], multiple: Mapping[str, int]
) -> list[_Family]:
    members: dict[tuple[str, int], list[NodeGroup]] = {}
    for group in chosen:
        members.setdefault((group.kind, group.size), []).append(group)
    families = []
    for (kind, size), same in members.items():
        least = max(group.minimum for group in same)
        kept = [k for k in range(least, size) if k % multiple.get(kind, 1) == 0]
        choices = (0, *sorted(size - k for k in kept))
        lost = np.zeros(size + 1)
        for group in same:
            lost[1:] += np.cumsum(np.sort(scores[group.name].double().numpy()))
        names = tuple(group.name for group in same)
        families.append(_Family(names, size, choices, tuple(float(lost[c]) for c in choices)))
    return families


def _choices(families: list[_Family]) -> Iterator[tuple[int, ...]]:
    if math.prod(len(family.choices) for family in families) > _MOST_CHOICES:
        raise BudgetError(
            f"{len(families)} families of groups allow too many layouts to compare",
            "raise prune.width_multiple or choose fewer kinds",
        )
    return itertools.product(*(family.choices for family in families))


def _after(
    groups: NodeGroups, counted: Collection[str], families: list[_Family], choice: tuple[int, ...]
) -> int:
    kept = {
        name: np.arange(family.size - count)
        for family, count in zip(families, choice, strict=True)
        if count
        for name in family.names
    }
    return _count(groups, counted, kept)


def _count(groups: NodeGroups, counted: Collection[str], kept: Mapping[str, np.ndarray]) -> int:
    selection = groups.selection(kept)
    total = 0
    for name, value in groups.graph.weights.items():
        if name not in counted:
            continue
        axes = groups.axes(name)
        sizes = [len(groups.keep(axis, selection)) for axis in axes] if axes else list(value.shape)
        total += math.prod(sizes)
    return total


def _lost(families: list[_Family], choice: tuple[int, ...]) -> float:
    return sum(
        family.cost_of[family.choices.index(count)] for family, count in zip(families, choice, strict=True)
    )
