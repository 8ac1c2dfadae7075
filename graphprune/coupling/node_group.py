"""A node group: units of coupled dimensions, and the axes of weights in which they lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphprune.coupling.algebra import Side
from graphprune.coupling.kinds import Kind
from graphprune.coupling.layout import Layout
from graphprune.coupling.selection import Indices, unit_of_index
from graphprune.errors import CouplingError


@dataclass(frozen=True, slots=True)
class Member:
    """One axis of one parameter or buffer in which a group has units.

    Attributes:
        parameter: Qualified name.
        axis: Which axis.
        side: Whether a contraction produces its result along this axis, consumes its input along it, or
            neither (norms, biases and buffers carry it). A shared buffer is *selected*: it stays whole, and what is
            computed from it is read through a selection by the operators of this group.
        shape: The whole parameter's shape.
        indices_per_unit: How many indices of the axis one unit owns.
        role: "parameter" or "buffer".
    """

    parameter: str
    axis: int
    side: Side
    shape: tuple[int, ...]
    indices_per_unit: int
    role: str
    layout: Layout = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Units of coupled dimensions: unit *u* is what all members own of index *u*.

    Attributes:
        name: Unique; says where and what for a reader, and means nothing to the program.
        kind: Inferred from the operators that it passes through.
        size: Number of units.
        members: Every (parameter, axis) that it reaches, in the graph's order.
        permutable: Whether its units can be renumbered without changing the function.
        prunable: Whether units may be removed.
        reason: Why not prunable; None if it is.
        parameters_per_unit: Elements of parameters that go with one unit.
        minimum: How many units must stay: 1, or as many as a top-k picks.
    """

    name: str
    kind: Kind
    size: int
    members: tuple[Member, ...]
    permutable: bool
    prunable: bool
    reason: str | None
    parameters_per_unit: int
    minimum: int
    atom: Layout = field(repr=False, compare=False)

    def owner(self, member: Member) -> Indices:
        """Return, for each index of a member's axis, the unit that owns it, or -1."""
        return unit_of_index(member.layout, self.atom)

    def indices(self, member: Member, unit: int) -> Indices:
        """Return which indices of a member's axis a unit owns.

        Raises:
            CouplingError: If there is no such unit.
        """
        if not 0 <= unit < self.size:
            raise CouplingError(
                f"'{self.name}' has no unit {unit}", f"its units are numbered from 0 to {self.size - 1}"
            )
        return np.flatnonzero(self.owner(member) == unit)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members that read the group's activations: scaling their input scales a unit's whole contribution."""
        return tuple(member for member in self.members if member.side == "consumes")

    def row(self) -> dict[str, Any]:
        """Return it as plain numbers and words, for groups.json, reports and pictures."""
        numbers = [_block(member.parameter) for member in self.members]
        blocks = {number for number in numbers if number is not None}
        return {
            "name": self.name,
            "kind": self.kind,
            "size": self.size,
            "permutable": self.permutable,
            "prunable": self.prunable,
            "reason": self.reason,
            "parameters_per_unit": self.parameters_per_unit,
            "block": blocks.pop() if len(blocks) == 1 else None,
            "members": [
                {
                    "parameter": member.parameter,
                    "axis": member.axis,
                    "size": member.shape[member.axis],
                    "per_unit": member.indices_per_unit,
                    "side": member.side,
                }
                for member in self.members
            ],
        }


def _block(parameter: str) -> int | None:
    """Return the number of the repeated block that a parameter lies in, for pictures: its first number."""
    return next((int(part) for part in parameter.split(".") if part.isdigit()), None)
