"""What ``groups.json`` holds: the node groups with all that a page or a picture of them needs, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout
from graphprune.coupling.node_group import NodeGroup
from graphprune.coupling.selection import Indices

SCHEMA = "graphprune.groups/1"

Document = Mapping[str, Any]
"""``groups.json`` as it was read or as `group_document` returns it."""


def group_document(groups: NodeGroups, model: str) -> dict[str, Any]:
    """Describe node groups as plain data.

    Args:
        groups: The node groups of a model.
        model: Its name, for people.

    Returns:
        A dictionary that JSON can hold:

        - ``model``, and ``elements``: how many parameters it has, and how many of them lie in prunable units;
        - ``parameters``: name, shape, role and the layout of each axis, in the order in which operators read them;
        - ``groups``: `NodeGroups.rows`, each with how many units must stay at least and the operators that couple
          its members, and each member with its role and its ``pieces``: unit *u* owns ``length`` indices from
          ``start + repeat · stride + u · length`` on, for each ``repeat`` below ``count``.
    """
    rows = groups.rows()
    for row, group in zip(rows, groups.values(), strict=True):
        row["minimum"] = group.minimum
        row["operators"] = [
            {"name": operator.name, "target": operator.target, "module": operator.module}
            for operator in groups.operators_of(group)
        ]
        for entry, member in zip(row["members"], group.members, strict=True):
            entry["role"] = member.role
            entry["pieces"] = pieces(group.owner(member))
    return {
        "schema": SCHEMA,
        "model": model,
        "elements": {"total": _total(groups), "prunable": _prunable(groups)},
        "parameters": _parameters(groups),
        "groups": rows,
    }


def pieces(owner: Indices) -> list[dict[str, int]]:
    """Return where the units of a group lie on an axis, as arithmetic progressions of equal pieces.

    Args:
        owner: For each index of the axis, the unit that owns it, or -1.
    """
    first = np.flatnonzero(owner == 0)
    runs = np.split(first, np.flatnonzero(np.diff(first) != 1) + 1)
    found: list[dict[str, int]] = []
    for start, length in ((int(run[0]), len(run)) for run in runs if len(run)):
        last = found[-1] if found and found[-1]["length"] == length else None
        if last is not None and last["count"] == 1:
            last |= {"count": 2, "stride": start - last["start"]}
        elif last is not None and start == last["start"] + last["count"] * last["stride"]:
            last["count"] += 1
        else:
            found.append({"start": start, "length": length, "count": 1, "stride": 0})
    return found


def _parameters(groups: NodeGroups) -> list[dict[str, Any]]:
    read = dict.fromkeys(
        value.name for operator in groups.graph.operators for value in operator.inputs if value.is_weight
    )
    names = dict.fromkeys((*read, *groups.graph.weights))
    owners = {group.atom.identity: group for group in groups.values()}
    return [
        {
            "name": name,
            "shape": list(groups.graph.weights[name].shape),
            "role": groups.graph.weights[name].role,
            "layout": [_layout(groups, axis, owners) for axis in groups.axes(name) or ()],
        }
        for name in names
        if name in groups.graph.weights
    ]


def _layout(groups: NodeGroups, layout: Layout, owners: Mapping[int, NodeGroup]) -> list[str | list[Any]]:
    """Return a layout as text to be joined; what a group owns is [size, kind] instead."""
    factors = groups.factors(layout)
    if len(factors) > 1:
        return _joined([_layout(groups, factor, owners) for factor in factors], " × ")
    only = factors[0]
    if only.form == "concat":
        return ["(", *_joined([_layout(groups, part, owners) for part in only.parts], " + "), ")"]
    group = owners.get(only.identity)
    return [[only.size, group.kind] if group else f"{only.size:,}"]


def _joined(parts: Sequence[list[str | list[Any]]], sign: str) -> list[str | list[Any]]:
    return [token for number, part in enumerate(parts) for token in ([sign, *part] if number else part)]


def _total(groups: NodeGroups) -> int:
    return sum(math.prod(value.shape) for value in groups.graph.weights.values() if value.role == "parameter")


def _prunable(groups: NodeGroups) -> int:
    """Return how many elements of parameters lie in a unit that may go, each counted once."""
    covered: dict[str, dict[int, Indices]] = {}
    for group in groups.values():
        for member in group.members:
            if group.prunable and member.role == "parameter":
                axes = covered.setdefault(member.parameter, {})
                owned = group.owner(member) >= 0
                axes[member.axis] = axes.get(member.axis, np.zeros_like(owned)) | owned
    free = 0
    for name, axes in covered.items():
        shape = groups.graph.weights[name].shape
        kept = [int(size - axes[i].sum()) if i in axes else size for i, size in enumerate(shape)]
        free += math.prod(shape) - math.prod(kept)
    return free
