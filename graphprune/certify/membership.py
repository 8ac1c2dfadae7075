"""Whether the members of node groups are all that the groups reach, and say which indices are whose."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout, atoms_of, find
from graphprune.coupling.node_group import Member, NodeGroup

Place = tuple[str, int]


def wrong_members(groups: NodeGroups) -> dict[str, tuple[str, ...]]:
    """Return what is wrong with the members of groups, in words, by the group's name.

    Every axis of every weight that holds a group's units, as its own layout has it or as an operator reads it through
    a copy, must be a member; its indices must be those that surgery takes.

    Args:
        groups: The node groups.
    """
    reached: dict[int, dict[Place, list[Layout]]] = {}
    for name, value in groups.graph.weights.items():
        for axis in range(len(value.shape)):
            for layout in groups.layouts(name, axis):
                for identity in {find(layout).identity, *(atom.identity for atom in atoms_of(layout))}:
                    reached.setdefault(identity, {}).setdefault((name, axis), []).append(layout)
    found = {
        name: tuple(_faults(groups, group, reached.get(group.atom.identity, {})))
        for name, group in groups.items()
    }
    return {name: faults for name, faults in found.items() if faults}


def _faults(groups: NodeGroups, group: NodeGroup, reached: dict[Place, list[Layout]]) -> Iterator[str]:
    listed = {(member.parameter, member.axis): member for member in group.members}
    for name, axis in reached.keys() - listed.keys():
        yield f"it lacks axis {axis} of {name}"
    for place, member in listed.items():
        if place not in reached:
            yield f"it has no units on axis {place[1]} of {place[0]}"
        elif not any(_agrees(groups, group, member, layout) for layout in reached[place]):
            yield f"it names other indices on axis {place[1]} of {place[0]} than surgery takes"


def _agrees(groups: NodeGroups, group: NodeGroup, member: Member, layout: Layout) -> bool:
    """Whether the indices of some units, as the member names them, are those that removing them takes."""
    if group.atom.form != "atom" or not group.prunable:
        return True  # surgery takes nothing of it
    gone = np.arange(group.size)[:: 2 if group.size > 2 else group.size]
    kept = groups.keep(layout, groups.selection({group.name: np.setdiff1d(np.arange(group.size), gone)}))
    owner = group.owner(member)
    return len(owner) == layout.size and np.array_equal(np.flatnonzero(~np.isin(owner, gone)), kept)
