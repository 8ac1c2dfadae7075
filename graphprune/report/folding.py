"""Node groups that differ only in the number of the block they lie in, folded into one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

Row = Mapping[str, Any]
Place = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Node groups that are alike.

    Attributes:
        name: Theirs, with ``*`` where their numbers differ.
        stack: Path of the repeated blocks that they lie in, up to the first number, as ``model.layers.*``; empty
            for what belongs to no block.
        rows: The groups, in their order; the first stands for all.
        places: For each, the numbers that belong where ``name`` has a ``*``.
        reasons: Why they are not prunable, each reason once.
    """

    name: str
    stack: str
    rows: tuple[Row, ...]
    places: tuple[Place, ...]
    reasons: tuple[str, ...]

    @property
    def first(self) -> Row:
        """The group that stands for all."""
        return self.rows[0]

    @property
    def where(self) -> str:
        """The name without the kind and without the stack, for a list that is sorted by stacks."""
        parts = (self.name.rpartition(":")[0] or self.name).split(".")
        depth = self.stack.count(".")
        if self.stack:
            parts = parts[depth + 1 :] if parts[depth] == "*" else parts[depth:]
        return ".".join(parts) or self.name

    def pattern_of(self, parameter: str) -> str:
        """Return the name of a parameter of the first group with ``*`` where the names of the others differ."""
        own = ".".join((*_path(self.first), ""))
        shared = self.name.removesuffix(self.first["name"].removeprefix(own[:-1]))
        return f"{shared}.{parameter.removeprefix(own)}" if own and parameter.startswith(own) else parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Members of one group that are alike; `parameter` has ``*`` where their numbers differ."""

    parameter: str
    places: tuple[Place, ...]
    first: Row


def fold(rows: Sequence[Row]) -> list[Family]:
    """Fold alike groups, in the order of the first of each.

    Groups are alike if they have the same kind, size, verdict and members, up to the numbers in the path that all of
    their parameters share.

    Args:
        rows: Of ``groups.json``.
    """
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault(_signature(row, _path(row)), []).append(row)
    return [_family(found) for found in alike.values()]


def fold_members(row: Row) -> list[Members]:
    """Fold the members of one group that are alike, in the order of the first of each."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for member in row["members"]:
        signature = (_starred(member["parameter"].split(".")), _alike(member))
        alike.setdefault(signature, []).append(member)
    result = []
    for found in alike.values():
        names = [member["parameter"] for member in found]
        name, places = _differing(names)
        result.append(Members(parameter=name, places=places, first=found[0]))
    return result


def fold_operators(row: Row) -> list[tuple[str, str, int]]:
    """Return the operators of a group as (target, module with ``*`` for numbers, how many)."""
    alike: dict[tuple[str, str], list[str]] = {}
    for operator in row.get("operators", ()):
        key = (operator["target"], _starred(operator["module"].split(".")))
        alike.setdefault(key, []).append(operator["module"])
    return [(target, _differing(modules)[0], len(modules)) for (target, _), modules in alike.items()]


def numbers_in_words(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: ``0–2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


def filled(pattern: str, place: Place) -> str:
    """Return `pattern` with its first ``*`` replaced by the numbers of `place`, in turn."""
    numbers = iter(place)
    return ".".join(str(next(numbers, part)) if part == "*" else part for part in pattern.split("."))


def stack_of(name: str) -> str:
    """Return the path of the repeated blocks that a parameter lies in, or an empty string."""
    parts = name.split(".")
    before = list(takewhile(lambda part: not part.isdecimal(), parts))
    return "" if len(before) == len(parts) else ".".join([*before, "*"])


def _path(row: Row) -> list[str]:
    """Return the path that the group's name and all of its parameters begin with."""
    members = [m for m in row["members"] if m.get("role", "parameter") == "parameter"] or row["members"]
    names = [member["parameter"].split(".")[:-1] for member in members]
    names.append(row["name"].rpartition(":")[0].split("."))
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))]
    return [] if "*" in shared else shared


def _signature(row: Row, path: list[str]) -> tuple[Any, ...]:
    start = ".".join((*path, ""))
    members = tuple(
        (member["parameter"].startswith(start), member["parameter"].removeprefix(start), _alike(member))
        for member in row["members"]
    )
    verdict = (row["permutable"], row["prunable"], re.sub(r"\d+", "#", row["reason"] or ""))
    sizes = (row["kind"], row["size"], row["minimum"], row["parameters_per_unit"], row["block"] is None)
    return (_starred(path), row["name"].removeprefix(start[:-1]), verdict, sizes, members)


def _alike(member: Row) -> tuple[Any, ...]:
    pieces = tuple(tuple(piece.values()) for piece in member.get("pieces", ()))
    return (member["axis"], member["size"], member["per_unit"], member["side"], member.get("role"), pieces)


def _family(rows: Sequence[Row]) -> Family:
    paths = [".".join(_path(row)) for row in rows]
    pattern, places = _differing(paths)
    return Family(
        name=pattern + rows[0]["name"].removeprefix(paths[0]),
        stack=stack_of(paths[0]),
        rows=tuple(rows),
        places=places,
        reasons=tuple(dict.fromkeys(row["reason"] for row in rows if row["reason"])),
    )


def _starred(parts: Sequence[str]) -> str:
    return ".".join("*" if part.isdecimal() else part for part in parts)


def _differing(names: Sequence[str]) -> tuple[str, tuple[Place, ...]]:
    """Return names as one pattern with ``*`` where they differ in a number, and each name's numbers there."""
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    differs = [len(set(column)) > 1 for column in columns]
    pattern = ".".join("*" if d else column[0] for column, d in zip(columns, differs, strict=True))
    places = zip(*(column for column, d in zip(columns, differs, strict=True) if d), strict=True)
    return pattern, tuple(tuple(int(n) for n in place) for place in places) or ((),) * len(names)
