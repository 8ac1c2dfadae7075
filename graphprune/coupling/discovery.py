"""From the layouts of all weights to node groups: an atom, with every axis that it is a part of."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from graphprune.coupling.algebra import Algebra
from graphprune.coupling.kinds import infer_kind
from graphprune.coupling.layout import Layout, find
from graphprune.coupling.low_rank import LinearPaths
from graphprune.coupling.node_group import Member, NodeGroup
from graphprune.trace.graph import OperatorGraph


def found_groups(graph: OperatorGraph, algebra: Algebra) -> tuple[NodeGroup, ...]:
    """Return the node groups of an analyzed graph, in the order of its parameters.

    Args:
        graph: The operator graph.
        algebra: The layouts of its values, as its operators demand them.
    """
    found: dict[int, dict[tuple[str, int], Member]] = {}
    atoms: dict[int, Layout] = {}
    for member, axis in (*_own_members(graph, algebra), *_selected_members(graph, algebra)):
        for identity, count in _occurrences(axis, atoms).items():
            counted = replace(member, indices_per_unit=count)
            found.setdefault(identity, {}).setdefault((member.parameter, member.axis), counted)
    names: Counter[str] = Counter()
    paths = LinearPaths(graph, algebra)
    return tuple(
        _group(atoms[identity], tuple(members.values()), names, paths)
        for identity, members in found.items()
        if any(member.role == "parameter" for member in members.values())
    )


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
