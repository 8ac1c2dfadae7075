"""From a share of a cost to a number of units for each group."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.node_group import NodeGroup
from graphprune.errors import BudgetError, NothingPrunableError, RecipeError, TrainingError
from graphprune.prune.allocation import Item, allocate, smallest_step
from graphprune.prune.costs import Cost

Layout = Literal["uniform", "per_layer"]
Width = tuple[str, int]
"""A group's name, and how many units it keeps."""
Curve = NDArray[np.float64]
"""What a group loses with 0, 1, 2, … units, its least salient first: (units + 1,)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many units each group loses.

    Attributes:
        removed_units: By group name.
        before: Cost of the model.
        after: Cost that remains.
        asked: The share that was asked for.
        unit: What is counted, such as ``parameters``.
    """

    removed_units: Mapping[str, int]
    before: float
    after: float
    asked: float
    unit: str = "parameters"

    @property
    def removed_share(self) -> float:
        """The share of the cost that goes."""
        return 1 - self.after / self.before

    def kept_units(self, groups: NodeGroups) -> dict[str, int]:
        """Return how many units stay of each group that loses some."""
        return {name: groups[name].size - count for name, count in self.removed_units.items()}

    def is_uniform(self, groups: NodeGroups) -> bool:
        """Whether all prunable groups of a kind and size lose the same number of units."""
        lost: dict[tuple[str, int], set[int]] = {}
        for group in groups.values():
            if group.prunable:
                lost.setdefault((group.kind, group.size), set()).add(self.removed_units.get(group.name, 0))
        return all(len(counts) == 1 for counts in lost.values())


def targets(groups: NodeGroups, kinds: Collection[str]) -> list[NodeGroup]:
    """Return the prunable groups of the given kinds.

    Raises:
        RecipeError: If no kind is given, or one names no group at all.
        NothingPrunableError: If none of the groups may be pruned; lists the reasons.
    """
    present = {group.kind for group in groups.values()}
    if not kinds:
        raise RecipeError("no kind of node groups is named", f"this model has {', '.join(sorted(present))}")
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


def score_curves(scores: Mapping[str, Tensor]) -> dict[str, Curve]:
    """Return the saliency lost with each number of units, by group.

    Raises:
        TrainingError: If a score is not finite.
    """
    curves = {}
    for name, score in scores.items():
        ascending = np.sort(score.detach().double().cpu().numpy())
        if not np.isfinite(ascending).all():
            raise TrainingError(
                f"a unit of '{name}' has a saliency that is not finite",
                "score on other calibration windows, in float32, or by another saliency",
            )
        curves[name] = np.concatenate([[0.0], np.cumsum(ascending)])
    return curves


def normalised_by_kind(curves: Mapping[str, Curve], groups: NodeGroups, cost: Cost) -> dict[str, Curve]:
    """Scale curves so that, over all groups of a kind, what is lost for each cost saved is one.

    Saliencies of different kinds need not be of one unit: heads with large scores would all stay, and channels pay
    for them. Within a kind nothing changes.

    Args:
        curves: What each group loses, by name.
        groups: The node groups.
        cost: What units are worth.
    """
    names: dict[str, list[str]] = {}
    for name in curves:
        names.setdefault(groups[name].kind, []).append(name)
    factors = {}
    for kind, same in names.items():
        lost = sum(float(np.abs(np.diff(curves[name])).sum()) for name in same)
        saved = cost() - cost(dict.fromkeys(same, 0))
        factors[kind] = saved / lost if lost > 0 else 1.0
    return {name: curve * factors[groups[name].kind] for name, curve in curves.items()}


def allot(
    groups: NodeGroups,
    curves: Mapping[str, Curve],
    cost: Cost,
    *,
    remove: float,
    layout: Layout = "uniform",
    width_multiple: Mapping[str, int] | None = None,
    keep_at_least: float = 0.0,
    refused: Collection[Width] = (),
) -> Budget:
    """Share a budget out among groups so that the least is lost.

    Of all allocations within half a step of the target (a step being the least that any choice can save, or that a
    measurement can tell) the one that loses least is taken. Stock model classes know one width for all layers, so a
    uniform layout loads everywhere.

    Args:
        groups: The node groups.
        curves: What each group that may lose units loses with each number of them, in one unit for all.
        cost: What is saved; its groups are those of `curves`.
        remove: The share of the cost to remove, 0 to 1.
        layout: ``uniform``: one width for all groups of a kind and size; ``per_layer``: each group its own.
        width_multiple: Kept units are a multiple of this, by kind.
        keep_at_least: The share of its units that each group keeps, 0 to 1.
        refused: Widths that no group may have, such as those that a model class does not build.

    Raises:
        BudgetError: If no allocation comes within a step of the target.
    """
    if layout not in get_args(Layout):
        raise BudgetError(f"there is no layout {layout!r}", f"use one of {', '.join(get_args(Layout))}")
    multiple = dict(width_multiple or {})
    families = _families(groups, curves, layout)
    items = [_item(family, groups, curves, multiple, keep_at_least, refused) for family in families]
    tied = cost.function.renamed({name: family[0] for family in families for name in family})
    before = cost()
    step = max(smallest_step(items, tied), tied.resolution * before)
    kinds = ", ".join(sorted({groups[name].kind for name in curves}))
    if step == math.inf:
        if any(len(item.choices) > 1 for item in items):
            raise BudgetError(
                f"no unit of {kinds} saves any {cost.name}",
                "choose other kinds, or another budget (recipe: prune.kinds, prune.budget)",
            )
        raise BudgetError(
            f"no group can lose a unit, save {cost.name}, and keep {keep_at_least:.0%} of its units and a multiple "
            f"of {multiple}",
            f"lower width_multiple, by kind ({kinds}), or keep_at_least "
            "(recipe: prune.width_multiple, prune.keep_at_least)",
        )
    goal = before * (1 - remove)
    found = allocate(items, tied, goal=goal, tolerance=step / 2)
    if abs(found.cost - goal) > step:
        raise BudgetError(
            f"{remove:.1%} of the {cost.name} cannot be removed from {kinds}; "
            f"the nearest is {1 - found.cost / before:.1%}",
            "ask for that, allow more kinds, or lower keep_at_least "
            "(recipe: prune.remove, prune.kinds, prune.keep_at_least)",
        )
    removed = {name: count for family in families for name in family if (count := found.removed[family[0]])}
    after = cost({name: groups[name].size - count for name, count in removed.items()})
    return Budget(removed, before, after, remove, cost.name)


def _families(groups: NodeGroups, names: Collection[str], layout: Layout) -> list[list[str]]:
    """Return the groups that lose the same number of units, together."""
    if layout == "per_layer":
        return [[name] for name in names]
    families: dict[tuple[str, int], list[str]] = {}
    for name in names:
        families.setdefault((groups[name].kind, groups[name].size), []).append(name)
    return list(families.values())


def _item(
    family: list[str],
    groups: NodeGroups,
    curves: Mapping[str, Curve],
    multiple: Mapping[str, int],
    keep_at_least: float,
    refused: Collection[Width],
) -> Item:
    kind, size = groups[family[0]].kind, groups[family[0]].size
    least = max(1, math.ceil(keep_at_least * size), *(groups[name].minimum for name in family))
    kept = [k for k in range(least, size) if k % multiple.get(kind, 1) == 0]
    kept = [k for k in kept if not any((name, k) in refused for name in family)]
    choices = (0, *sorted(size - k for k in kept))
    lost = np.sum([curves[name] for name in family], axis=0)
    return Item(family[0], size, choices, tuple(lost[list(choices)].tolist()))
