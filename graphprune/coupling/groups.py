"""Node groups: which indices of which parameters must be permuted and removed together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np

from graphprune.coupling.algebra import Algebra, Axes, Side
from graphprune.coupling.analysis import analyze
from graphprune.coupling.kinds import Kind, infer_kind
from graphprune.coupling.layout import Layout
from graphprune.coupling.selection import Indices, Selection, select, unit_of_index
from graphprune.errors import CouplingError
from graphprune.trace.graph import OperatorGraph


@dataclass(frozen=True, slots=True)
class Member:
    """One axis of one parameter or buffer in which a group has units.

    Attributes:
        parameter: Qualified name.
        axis: Which axis.
        side: Whether a contraction produces its result along this axis, consumes its input along it, or
            neither (norms, biases and buffers carry it).
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
    """

    name: str
    kind: Kind
    size: int
    members: tuple[Member, ...]
    permutable: bool
    prunable: bool
    reason: str | None
    parameters_per_unit: int
    atom: Layout = field(repr=False, compare=False)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members that read the group's activations: scaling their input scales a unit's whole contribution."""
        return tuple(member for member in self.members if member.side == "consumes")


class NodeGroups(Mapping[str, NodeGroup]):
    """All node groups of a graph, by name, in the graph's order.

    Attributes:
        graph: The operator graph that they were read off.
    """

    def __init__(self, graph: OperatorGraph, algebra: Algebra, groups: tuple[NodeGroup, ...]) -> None:
        self.graph = graph
        self._algebra = algebra
        self._groups = {group.name: group for group in groups}

    def __getitem__(self, name: str) -> NodeGroup:
        try:
            return self._groups[name]
        except KeyError:
            raise CouplingError(
                f"there is no node group '{name}'", f"list(groups) names all {len(self._groups)} of them"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def axes(self, value_name: str) -> Axes | None:
        """Return the layouts of a weight's or an activation's axes, or None if no operator touched it."""
        return self._algebra.known(value_name)

    def indices(self, group: NodeGroup, member: Member, unit: int) -> Indices:
        """Return which indices of a member's axis a unit of `group` owns."""
        return np.flatnonzero(self.owner(group, member) == unit)

    def owner(self, group: NodeGroup, member: Member) -> Indices:
        """Return, for each index of a member's axis, the unit of `group` that owns it, or -1."""
        axes = self.axes(member.parameter)
        if axes is None:
            raise CouplingError(f"no operator reads '{member.parameter}'", "take members from group.members")
        return unit_of_index(self._algebra.solver, axes[member.axis], group.atom)

    def selection(self, kept: Mapping[str, Indices]) -> Selection:
        """Turn units to keep by group name into a selection for `keep`."""
        return {self[name].atom.identity: units for name, units in kept.items()}

    def keep(self, layout: Layout, selection: Selection) -> Indices:
        """Return the indices of an axis that a selection keeps, in their new order."""
        return select(self._algebra.solver, layout, selection)

    def atoms(self, layout: Layout) -> Iterator[Layout]:
        """Yield the atoms that an axis is made of."""
        return self._algebra.solver.atoms(layout)

    def factors(self, layout: Layout) -> list[Layout]:
        """Return the factors of an axis, outermost first."""
        return self._algebra.solver.factors(layout)

    @cached_property
    def coupling(self) -> nx.Graph[int]:
        """The coupling graph: layouts as nodes, and as edges the operators that demand them equal."""
        graph: nx.Graph[int] = nx.Graph()
        for coupling in self._algebra.solver.couplings:
            graph.add_edge(coupling.first, coupling.second, operator=coupling.operator)
        return graph

    def rows(self) -> list[dict[str, Any]]:
        """Return the groups as plain rows for groups.json, reports and pictures."""
        return [_row(group) for group in self.values()]


def node_groups(graph: OperatorGraph) -> NodeGroups:
    """Analyze an operator graph and return its node groups.

    Args:
        graph: From `graphprune.trace`.

    Returns:
        A mapping from name to group, ordered as the parameters stand in the model and reproducible.
    """
    algebra = analyze(graph)
    found: dict[int, list[Member]] = {}
    atoms: dict[int, Layout] = {}
    for name, value in graph.weights.items():
        axes = algebra.known(name)
        if axes is None:
            continue
        for position, axis in enumerate(axes):
            for identity, count in _occurrences(algebra, axis, atoms).items():
                side = algebra.sides.get((name, position), "carries")
                member = Member(name, position, side, value.shape, count, value.role)
                found.setdefault(identity, []).append(member)
    names: Counter[str] = Counter()
    groups = tuple(_group(atoms[identity], tuple(members), names) for identity, members in found.items())
    return NodeGroups(graph, algebra, groups)


def _occurrences(algebra: Algebra, axis: Layout, atoms: dict[int, Layout]) -> dict[int, int]:
    """Return how many indices a unit of each atom owns on an axis, by the atom's identity.

    Atoms of a single unit are left out: there is nothing to permute, and nothing may be removed.
    """
    present = {atom.identity: atom for atom in algebra.solver.atoms(axis) if atom.size > 1}
    atoms.update(present)
    return {
        identity: int((unit_of_index(algebra.solver, axis, atom) == 0).sum())
        for identity, atom in present.items()
    }


def _group(atom: Layout, members: tuple[Member, ...], names: Counter[str]) -> NodeGroup:
    parameters = [member for member in members if member.role == "parameter"]
    sides = [member.side for member in parameters]
    kind = infer_kind(atom.marks, sides, len({member.parameter for member in parameters}))
    reason = next(iter((*atom.pins, *atom.blocks)), None)
    freed = sum(
        int(np.prod(member.shape)) // member.shape[member.axis] * member.indices_per_unit
        for member in parameters
    )
    name = f"{_common_path([member.parameter for member in parameters or members])}:{kind}"
    names[name] += 1
    if names[name] > 1:
        name = f"{name}#{names[name]}"
    return NodeGroup(
        name=name,
        kind=kind,
        size=atom.size,
        members=members,
        permutable=not atom.pins,
        prunable=reason is None,
        reason=reason,
        parameters_per_unit=freed,
        atom=atom,
    )


def _common_path(parameters: list[str]) -> str:
    paths = [name.split(".")[:-1] for name in parameters]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared) or "model"


def _row(group: NodeGroup) -> dict[str, Any]:
    numbers = [_block(member.parameter) for member in group.members]
    blocks = {number for number in numbers if number is not None}
    return {
        "name": group.name,
        "kind": group.kind,
        "size": group.size,
        "permutable": group.permutable,
        "prunable": group.prunable,
        "reason": group.reason,
        "parameters_per_unit": group.parameters_per_unit,
        "block": blocks.pop() if len(blocks) == 1 else None,
        "members": [
            {
                "parameter": member.parameter,
                "axis": member.axis,
                "size": member.shape[member.axis],
                "per_unit": member.indices_per_unit,
                "side": member.side,
            }
            for member in group.members
        ],
    }


def _block(parameter: str) -> int | None:
    """Return the number of the repeated block that a parameter lies in, for pictures: its first number."""
    return next((int(part) for part in parameter.split(".") if part.isdigit()), None)
