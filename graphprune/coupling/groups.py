"""Node groups: which indices of which parameters must be permuted and removed together."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import networkx as nx

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.analysis import analyze
from graphprune.coupling.discovery import found_groups
from graphprune.coupling.layout import Layout, atoms_of, find
from graphprune.coupling.node_group import NodeGroup
from graphprune.coupling.selection import Indices, Selection, select
from graphprune.errors import CouplingError, NothingPrunableError
from graphprune.trace.graph import Operator, OperatorGraph, Value


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
        return [group.row() for group in self.values()]


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
        algebra = analyze(graph)
        return NodeGroups(graph, algebra, found_groups(graph, algebra))


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
