"""The plan: which units to remove."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.node_group import NodeGroup
from graphprune.coupling.selection import Indices
from graphprune.errors import RecipeError, ShrinkError
from graphprune.files import write_json

SCHEMA = "graphprune.plan/1"


@dataclass(frozen=True)
class Plan(Mapping[str, tuple[int, ...]]):
    """Units to remove, by group name; sorted, without repetition, groups that lose nothing left out.

    Args:
        removed: Numbers of the units to remove, by group name.
        whole: Whether a group may lose all its units: what it computes is then gone, biases behind it stay.

    Raises:
        ShrinkError: If a unit is not a whole number.
    """

    removed: Mapping[str, Sequence[int]]
    whole: bool = False

    def __post_init__(self) -> None:
        cleaned = {name: _numbers(name, units) for name, units in self.removed.items()}
        object.__setattr__(
            self, "removed", {name: cleaned[name] for name in sorted(cleaned) if cleaned[name]}
        )

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return tuple(self.removed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.removed)

    def __len__(self) -> int:
        return len(self.removed)

    def check(self, groups: NodeGroups) -> None:
        """Check that `groups` allow this plan.

        Raises:
            ShrinkError: If a group is unknown or unprunable, a unit does not exist, or none would be left.
        """
        for name, units in self.items():
            group = groups[name]
            if not group.prunable:
                raise ShrinkError(
                    f"group '{name}' cannot be pruned: {group.reason}", "leave it out of the plan"
                )
            if units[0] < 0 or units[-1] >= group.size:
                raise ShrinkError(
                    f"the plan removes unit {units[-1] if units[-1] >= group.size else units[0]} of '{name}', "
                    f"which has {group.size}",
                    "make the plan for this very model",
                )
            if self.whole and group.minimum == 1:
                self._check_whole(group)
                continue
            if group.size - len(units) < group.minimum:
                raise ShrinkError(
                    f"the plan leaves {group.size - len(units)} of {group.size} units of '{name}'",
                    "keep at least one, or say Plan(..., whole=True) to remove the block on purpose"
                    if group.minimum == 1
                    else f"a top-k picks {group.minimum} of them",
                )

    def _check_whole(self, group: NodeGroup) -> None:
        if len(self[group.name]) == group.size and "normalised" in group.atom.marks:
            raise ShrinkError(
                f"the plan removes all units of '{group.name}', which a norm or a mean runs over: nothing is left "
                "to divide by",
                "keep at least one",
            )

    def kept(self, groups: NodeGroups) -> dict[str, Indices]:
        """Return the units that stay, in order, of every group that loses some."""
        return {name: np.setdiff1d(np.arange(groups[name].size), units) for name, units in self.items()}

    def then(self, later: Plan, groups: NodeGroups) -> Plan:
        """Compose: this plan, followed by `later`, which counts units of the already smaller model.

        Names in `later` are those of `groups`. An analysis of the smaller model has the same, with one exception: an
        axis within a width that is down to one unit is no axis any more, and the numbers behind # may move up.

        Raises:
            ShrinkError: If `later` removes a unit that this plan leaves no place for.
        """
        removed = {name: set(units) for name, units in self.items()}
        for name, units in later.items():
            survivors = np.setdiff1d(np.arange(groups[name].size), list(removed.get(name, ())))
            if units[0] < 0 or units[-1] >= len(survivors):
                raise ShrinkError(
                    f"the later plan removes unit {units[-1] if units[0] >= 0 else units[0]} of '{name}', "
                    f"of which the earlier one leaves {len(survivors)}",
                    "number the units of the model that the earlier plan makes",
                )
            removed.setdefault(name, set()).update(int(survivors[unit]) for unit in units)
        return Plan({name: sorted(units) for name, units in removed.items()}, self.whole or later.whole)

    def save(self, path: str | Path, **extra: object) -> None:
        """Write the plan as JSON; `extra` keys stand beside it."""
        removed = {name: list(units) for name, units in self.items()}
        write_json(Path(path), {"schema": SCHEMA, "removed": removed, "whole": self.whole, **extra})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            RecipeError: If the file is not such a plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"its schema is {content['schema']}")
            return cls(content["removed"], bool(content.get("whole", False)))
        except (ShrinkError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = error.problem if isinstance(error, ShrinkError) else error
            raise RecipeError(
                f"{path} is not a plan: {problem}",
                f"give a JSON file with schema {SCHEMA} and units by group",
            ) from error


def _numbers(name: str, units: Iterable[object]) -> tuple[int, ...]:
    """Return units as sorted numbers; truth values, as of a mask, are none."""
    try:
        found = list(units)
        if any(isinstance(unit, bool) or str(getattr(unit, "dtype", "")).endswith("bool") for unit in found):
            raise TypeError("truth values are not numbers of units")
        return tuple(sorted({operator.index(unit) for unit in found}))  # type: ignore[arg-type]
    except TypeError as error:
        raise ShrinkError(
            f"the plan for '{name}' is {units!r}: {error}", "give the numbers of the units to remove: [0, 3]"
        ) from error
