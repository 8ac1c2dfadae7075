"""Node groups: which indices of which parameters must be permuted and removed together."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np

from graphprune.coupling.algebra import Algebra, Axes, Side
from graphprune.coupling.analysis import analyze
from graphprune.coupling.kinds import Kind, infer_kind
from graphprune.coupling.layout import Layout, atoms_of, find
from graphprune.coupling.low_rank import LinearPaths
from graphprune.coupling.selection import Indices, Selection, select, unit_of_index
from graphprune.errors import CouplingError, NothingPrunableError
from graphprune.trace.graph import Operator, OperatorGraph, Value


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


class NodeGroups(Mapping[str, NodeGroup]):
    """All node groups of a graph, by name, in the graph's order.

    Attributes:
        graph: The operator graph that they were read off.
    """

    def __init__(self, graph: OperatorGraph, algebra: Algebra, groups: tuple[NodeGroup, ...]) -> None:
        self.graph = graph
        self._algebra = algebra
        self._groups = {group.name: group for group in groups}
        self._copies: dict[str, dict[str, Axes]] = {}
        for (operator, value), copy in algebra.copies.items():
            self._copies.setdefault(operator, {})[value] = copy.axes

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

    def prunable(self) -> tuple[NodeGroup, ...]:
        """Return the groups that may lose units.

        Raises:
            NothingPrunableError: If there are none; lists each reason once, with the groups that it holds for.
        """
        found = tuple(group for group in self.values() if group.prunable)
        if not found:
            raise NothingPrunableError.because((name, group.reason or "") for name, group in self.items())
        return found

    def axes(self, value_name: str) -> Axes | None:
        """Return the layouts of a weight's or an activation's axes, or None if no operator touched it."""
        return self._algebra.known(value_name)

    def layouts(self, weight: str, axis: int) -> Iterator[Layout]:
        """Yield the layouts of an axis: the weight's own, and those of copies that operators read of a buffer's."""
        axes = self.axes(weight)
        if axes is None:
            return
        yield axes[axis]
        if self.graph.weights[weight].role == "buffer":
            yield from self._layouts_of_copies.get(find(axes[axis]).identity, ())

    @cached_property
    def _layouts_of_copies(self) -> dict[int, list[Layout]]:
        found: dict[int, list[Layout]] = {}
        for copy in self._algebra.copies.values():
            for source, layout in copy.made.items():
                found.setdefault(find(self._algebra.solver.layouts[source]).identity, []).append(layout)
        return found

    def read(self, operator: str) -> dict[str, Axes]:
        """Return what an operator reads through a copy of its layout: axes by the value's name."""
        return self._copies.get(operator, {})

    def selection(self, kept: Mapping[str, Indices]) -> Selection:
        """Turn units to keep by group name into a selection for `keep`."""
        return {self[name].atom.identity: units for name, units in kept.items()}

    def keep(self, layout: Layout, selection: Selection) -> Indices:
        """Return the indices of an axis that a selection keeps, in their new order."""
        return select(layout, selection)

    def atoms(self, layout: Layout) -> Iterator[Layout]:
        """Yield the atoms that an axis is made of."""
        return self._algebra.solver.atoms(layout)

    def segments(self, layout: Layout) -> list[Layout]:
        """Return the segments of an axis, in order."""
        return self._algebra.solver.segments(layout)

    def factors(self, layout: Layout) -> list[Layout]:
        """Return the factors of an axis, outermost first."""
        return self._algebra.solver.factors(layout)

    @cached_property
    def coupling(self) -> nx.Graph[int]:
        """The coupling graph: layouts as nodes, and as edges the operators that demand them equal.

        A node has the ``size`` of its layout, an edge the ``operator`` and the ``relation``: two layouts are *equal*,
        or one is a *part* of the other.
        """
        graph: nx.Graph[int] = nx.Graph()
        for coupling in self._algebra.solver.couplings:
            graph.add_edge(
                coupling.first, coupling.second, operator=coupling.operator, relation=coupling.relation
            )
        for node in graph:
            graph.nodes[node]["size"] = self._algebra.solver.layouts[node].size
        return graph

    def why(self, first: str, second: str) -> tuple[Operator, ...]:
        """Return the shortest path of operators that couples two axes.

        Args:
            first: An axis of a weight, such as ``model.layers.0.mlp.gate_proj.weight:0``.
            second: Another.

        Returns:
            Operators in order; none if the two are one axis of one weight.

        Raises:
            CouplingError: If there is no such axis, or nothing couples the two.
        """
        starts, ends = self._axis(first), self._axis(second)
        shared = {atom.identity for atom in atoms_of(starts)} & {atom.identity for atom in atoms_of(ends)}
        layouts = self._algebra.solver.layouts
        for identity in sorted(shared, key=lambda atom: -layouts[atom].size):
            of_atom = self._layouts_of_atom[identity]
            path = nx.shortest_path(self.coupling.subgraph(of_atom), starts.identity, ends.identity)
            names = [self.coupling.edges[edge]["operator"] for edge in itertools.pairwise(path)]
            return tuple(self._operators[name] for name, _ in itertools.groupby(names) if name)
        raise CouplingError(
            f"nothing couples {first} and {second}", "see the members of each group: groups[name].members"
        )

    def operators_of(self, group: NodeGroup) -> tuple[Operator, ...]:
        """Return the operators that couple a group's members, in the graph's order."""
        graph = self.coupling.subgraph(self._layouts_of_atom.get(group.atom.identity, ()))
        names: set[str | None] = {graph.edges[edge]["operator"] for edge in graph.edges}
        return tuple(operator for name, operator in self._operators.items() if name in names)

    @cached_property
    def _operators(self) -> dict[str, Operator]:
        return {operator.name: operator for operator in self.graph.operators}

    @cached_property
    def _layouts_of_atom(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for node in self.coupling:
            for atom in atoms_of(self._algebra.solver.layouts[node]):
                found.setdefault(atom.identity, set()).add(node)
        return found

    def _axis(self, name: str) -> Layout:
        parameter, _, axis = name.rpartition(":")
        weight = self.graph.tied.get(parameter, parameter)
        axes = self._algebra.known(weight) if weight in self.graph.weights else None
        if axes is None or not axis.isdigit() or int(axis) >= len(axes):
            raise CouplingError(
                f"there is no axis '{name}'",
                "name a weight that some operator reads, and an axis of it: 'model.norm.weight:0'",
            )
        return axes[int(axis)]

    def contractions(self) -> Iterator[tuple[Operator, tuple[tuple[Value, Layout], ...]]]:
        """Yield every sum of products: its operator, and its operands with the axis of each that is summed over."""
        for name, operands in self._algebra.sums:
            if len(operands) > 1:
                yield self._operators[name], operands

    def rows(self) -> list[dict[str, Any]]:
        """Return the groups as plain rows for groups.json, reports and pictures."""
        return [_row(group) for group in self.values()]


def node_groups(graph: OperatorGraph) -> NodeGroups:
    """Analyze an operator graph and return its node groups.

    Args:
        graph: From `graphprune.trace`.

    Returns:
        A mapping from name to group, ordered as the parameters stand in the model and reproducible.

    Raises:
        CouplingError: If it is not an operator graph.
    """
    if not isinstance(graph, OperatorGraph):
        raise CouplingError(
            f"node groups are read off an operator graph, not off a {type(graph).__name__}",
            "trace the model first: node_groups(trace(model, example_inputs))",
        )
    with _no_collection():
        return _found(graph, analyze(graph))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Put garbage collection off: what is made here stays, and the traced program is large to walk through."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _found(graph: OperatorGraph, algebra: Algebra) -> NodeGroups:
    found: dict[int, dict[tuple[str, int], Member]] = {}
    atoms: dict[int, Layout] = {}
    for member, axis in (*_own_members(graph, algebra), *_selected_members(graph, algebra)):
        for identity, count in _occurrences(axis, atoms).items():
            counted = replace(member, indices_per_unit=count)
            found.setdefault(identity, {}).setdefault((member.parameter, member.axis), counted)
    names: Counter[str] = Counter()
    paths = LinearPaths(graph, algebra)
    groups = tuple(
        _group(atoms[identity], tuple(members.values()), names, paths)
        for identity, members in found.items()
        if any(member.role == "parameter" for member in members.values())
    )
    return NodeGroups(graph, algebra, groups)


def _own_members(graph: OperatorGraph, algebra: Algebra) -> Iterator[tuple[Member, Layout]]:
    """Yield every axis of every weight that some operator reads."""
    for name, value in graph.weights.items():
        for position, axis in enumerate(algebra.known(name) or ()):
            side = algebra.sides.get((name, position), "carries")
            yield Member(name, position, side, value.shape, 0, value.role, axis), axis


def _selected_members(graph: OperatorGraph, algebra: Algebra) -> Iterator[tuple[Member, Layout]]:
    """Yield the axes of buffers as operators read them through a copy: rotary frequencies, for one."""
    by_layout: dict[int, list[Member]] = {}
    for name, value in graph.weights.items():
        for position, axis in enumerate(algebra.known(name) or ()):
            if value.role == "buffer" and axis.size > 1:
                member = Member(name, position, "selected", value.shape, 0, value.role, axis)
                by_layout.setdefault(find(axis).identity, []).append(member)
    for copy in algebra.copies.values():
        for source, layout in copy.made.items():
            for member in by_layout.get(find(algebra.solver.layouts[source]).identity, ()):
                yield replace(member, layout=layout), layout


def _occurrences(axis: Layout, atoms: dict[int, Layout]) -> dict[int, int]:
    """Return how many indices a unit of each atom owns on an axis, by the atom's identity.

    Atoms of a single unit are left out: there is nothing to permute, and nothing may be removed. An axis that is made
    of nothing else stands for itself.
    """
    counts: dict[int, int] = {}
    whole = find(axis)
    _count(whole, 1, counts, atoms)
    if not counts and whole.size > 1:  # cut into single indices: nothing to choose from, but to be told
        atoms[whole.identity] = whole
        counts[whole.identity] = 1
    return counts


def _count(layout: Layout, times: int, counts: dict[int, int], atoms: dict[int, Layout]) -> None:
    """Add to `counts` how many indices one unit of each atom owns, each of which stands for `times` indices."""
    if layout.form == "atom":
        if layout.size > 1:
            atoms[layout.identity] = layout
            counts[layout.identity] = counts.get(layout.identity, 0) + times
        return
    for part in layout.parts:
        part = find(part)
        inner = layout.size // part.size if layout.form == "product" else 1
        _count(part, times * inner, counts, atoms)


def _group(atom: Layout, members: tuple[Member, ...], names: Counter[str], paths: LinearPaths) -> NodeGroup:
    parameters = [member for member in members if member.role == "parameter"]
    sides = [member.side for member in parameters]
    reached = tuple({member.parameter: None for member in parameters})
    is_update = len(reached) == 2 and paths.lie_beside_another(reached)
    kind = infer_kind(atom.marks, sides, is_update=is_update)
    reason = _reason(atom)
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
        permutable=not atom.pins and atom.form == "atom",
        prunable=reason is None,
        reason=reason,
        parameters_per_unit=freed,
        minimum=atom.minimum,
        atom=atom,
    )


def _reason(atom: Layout) -> str | None:
    """Return why no unit of an atom may be removed, or None."""
    for reason in (*atom.pins, *atom.blocks):
        return reason
    if atom.form != "atom":
        return "each of its indices is read for itself"
    if "softmax" in atom.marks and "routed" not in atom.marks:
        return "softmax over this axis: its other units would change"
    if "ranked" in atom.marks and "routed" not in atom.marks:
        return "a top-k over this axis is read for its values alone: others would take the place of one that is gone"
    if atom.minimum >= atom.size:
        return f"a top-k picks {atom.minimum} of its {atom.size} units"
    return None


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
