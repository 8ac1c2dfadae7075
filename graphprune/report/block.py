"""One block's part of the node groups, with what is alike folded into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bond:
    """A node group as it is drawn.

    `label` is its name without the block's path, `ends` are the axes that it couples in the block, each with
    its parameter's label. `copies` counts the alike groups that it stands for, `elsewhere` its members outside of
    the block; `local` says that it belongs to the block alone.
    """

    name: str
    label: str
    kind: str
    size: int
    prunable: bool
    reason: str | None
    parameters_per_unit: int
    local: bool
    ends: tuple[tuple[str, int], ...]
    copies: int = 1
    elsewhere: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The labels of a block's parameters, from top to bottom, and the groups that bind them."""

    parameters: tuple[str, ...]
    bonds: tuple[Bond, ...]


def block_of(groups: Sequence[Row], block: int | None = None) -> Block:
    """Return the block numbered `block`, or the first one; all groups if none belongs to a block.

    Groups of no block take part with the members that lie under the block's own path. Parameters and groups
    that differ in nothing but a number in their path (experts) become one.
    """
    numbers = sorted({row["block"] for row in groups if row.get("block") is not None})
    if block is not None and block not in numbers:
        return Block(parameters=(), bonds=())
    number = numbers[0] if block is None and numbers else block
    path = _path_of([row for row in groups if row.get("block") == number], number)
    inside = [(row, members) for row in groups if (members := _members_in(row, path))]
    labels = _labels(inside, path)
    first: dict[tuple[Any, ...], Bond] = {}
    copies: Counter[tuple[Any, ...]] = Counter()
    for row, members in inside:
        local = number is not None and row.get("block") == number
        bond = _bond(row, members, labels, path=".".join((*path, "")), local=local)
        alike = (bond.kind, bond.size, bond.prunable, bond.reason, frozenset(bond.ends))
        first.setdefault(alike, bond)
        copies[alike] += 1
    bonds = tuple(replace(bond, copies=copies[alike]) for alike, bond in first.items())
    return Block(parameters=_order(bonds), bonds=bonds)


def _path_of(rows: Sequence[Row], number: int | None) -> tuple[str, ...]:
    """Return the path of the block: that of its first parameter, up to the block's own number."""
    for parts in (member["parameter"].split(".") for row in rows for member in row["members"]):
        if str(number) in parts:
            return tuple(parts[: parts.index(str(number)) + 1])
    return ()


def _members_in(row: Row, path: tuple[str, ...]) -> list[Row]:
    return [member for member in row["members"] if tuple(member["parameter"].split(".")[: len(path)]) == path]


def _labels(inside: Sequence[tuple[Row, list[Row]]], path: tuple[str, ...]) -> dict[str, str]:
    """Return a short label for each parameter; those that differ in a number alone share theirs."""
    roles: dict[str, set[tuple[str, int]]] = {}
    for row, members in inside:
        for member in members:
            roles.setdefault(member["parameter"], set()).add((row["kind"], member["axis"]))
    patterns: dict[str, list[str]] = {}
    for parameter in roles:
        short = parameter.split(".")[len(path) :] or parameter.split(".")
        pattern = ".".join("*" if part.isdecimal() else part for part in short)
        patterns.setdefault(pattern, []).append(parameter)
    labels: dict[str, str] = {}
    for pattern, parameters in patterns.items():
        alike = len(parameters) > 1 and all(
            roles[parameter] == roles[parameters[0]] for parameter in parameters
        )
        for parameter in parameters:
            own = ".".join(parameter.split(".")[len(path) :]) or parameter
            labels[parameter] = f"{pattern} × {len(parameters)}" if alike else own
    return labels


def _bond(row: Row, members: list[Row], labels: Mapping[str, str], *, path: str, local: bool) -> Bond:
    return Bond(
        name=row["name"],
        label=row["name"].removeprefix(path),
        kind=row["kind"],
        size=row["size"],
        prunable=row["prunable"],
        reason=row.get("reason"),
        parameters_per_unit=row["parameters_per_unit"],
        local=local,
        ends=tuple(dict.fromkeys((labels[member["parameter"]], member["axis"]) for member in members)),
        elsewhere=len(row["members"]) - len(members),
    )


def _order(bonds: Sequence[Bond]) -> tuple[str, ...]:
    """Return the labels in the order of the widest group's members, those of one module together."""
    by_width = sorted(bonds, key=lambda bond: -len(bond.ends))
    labels = dict.fromkeys(label for bond in by_width for label, _ in bond.ends)
    modules = list(dict.fromkeys(label.partition(".")[0] for label in labels))
    return tuple(sorted(labels, key=lambda label: modules.index(label.partition(".")[0])))
