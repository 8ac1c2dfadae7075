"""One repeated block with what stands before and after it, as a picture shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from graphprune.report.folding import Row, fold, stack_of
from graphprune.report.group_document import Document

Part = Literal["before", "block", "after"]

# So many parameters that differ in a later number alone (experts, not the two norms of a block) become one box.
_ALIKE = 4
# A model without repeated blocks is drawn whole up to this many parameters.
_WHOLE = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A parameter as it is drawn: `label` below the caption of its `module`, `name` in full."""

    name: str
    label: str
    module: str
    shape: tuple[int, ...]
    part: Part
    copies: int = 1


@dataclass(frozen=True, slots=True)
class End:
    """Where a group meets a box: the box's name, the axis, and whether a contraction reads or writes along it."""

    box: str
    axis: int
    side: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bond:
    """A node group as it is drawn.

    `copies` counts the alike groups that it stands for, `elsewhere` its members that are not drawn; `local` says
    that it runs through nothing but what is drawn in one part. A `bundle` is no group: it stands for `copies` groups
    of one axis each, which stay for the same reason.
    """

    name: str
    kind: str
    size: int
    prunable: bool
    reason: str | None
    parameters_per_unit: int
    local: bool
    ends: tuple[End, ...]
    copies: int = 1
    elsewhere: int = 0
    bundle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Boxes in the order in which operators read them, and the groups that bind them."""

    path: str
    alike: tuple[str, ...]
    boxes: tuple[Box, ...]
    bonds: tuple[Bond, ...]


def distinct_blocks(document: Document) -> list[tuple[str, ...]]:
    """Return the paths of the repeated blocks, those together that have the same groups; the most frequent first."""
    found: dict[str, list[int]] = {}
    for number, family in enumerate(fold(document["groups"])):
        for row in family.rows:
            for path in dict.fromkeys(_block_path(member["parameter"]) for member in row["members"]):
                if path:
                    found.setdefault(path, []).append(number)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for path, families in found.items():
        alike.setdefault((stack_of(f"{path}.x"), *sorted(families)), []).append(path)
    return sorted((tuple(paths) for paths in alike.values()), key=lambda paths: -len(paths))


def block_of(document: Document, path: str | None = None) -> Block:
    """Return what a picture of one block shows.

    Args:
        document: The groups, as ``groups.json`` holds them.
        path: The block, as ``model.layers.3``; by default the first of the most frequent ones, or the whole of a
            small model in which no two blocks are alike.
    """
    kinds = distinct_blocks(document)
    if path is None:
        repeated = bool(kinds) and (len(kinds[0]) > 1 or len(document["parameters"]) > _WHOLE)
        path = kinds[0][0] if repeated else ""
    alike = next((paths for paths in kinds if path in paths), ())
    if path and not alike:
        return Block(path=path, alike=(), boxes=(), bonds=())
    inside = [(row, drawn) for row in document["groups"] if (drawn := _drawn_members(row, path))]
    names = _folded_names(inside)
    boxes = _boxes(document["parameters"], names, path)
    first: dict[tuple[Any, ...], Bond] = {}
    copies: Counter[tuple[Any, ...]] = Counter()
    for row, members in inside:
        bond = _bond(row, members, names, {box.name: box.part for box in boxes})
        same = (bond.kind, bond.size, bond.prunable, bond.reason, frozenset(bond.ends))
        first.setdefault(same, bond)
        copies[same] += 1
    bonds = [replace(bond, copies=copies[same]) for same, bond in first.items()]
    return Block(path=path, alike=alike, boxes=boxes, bonds=tuple(_bundled(bonds)))


def _block_path(parameter: str) -> str:
    stack = stack_of(parameter)
    return ".".join(parameter.split(".")[: stack.count(".") + 1]) if stack else ""


def _drawn_members(row: Row, path: str) -> list[Row]:
    """Return the members in the block or outside of all blocks; none if the group belongs to other blocks."""
    if not path:
        return list(row["members"])
    places = {_block_path(member["parameter"]) for member in row["members"]}
    if path not in places and places != {""}:
        return []
    return [member for member in row["members"] if _block_path(member["parameter"]) in ("", path)]


def _folded_names(inside: Sequence[tuple[Row, list[Row]]]) -> dict[str, str]:
    """Return for each parameter the first of those that differ from it in a later number alone (experts)."""
    roles: dict[str, set[tuple[Any, ...]]] = {}
    for row, members in inside:
        for member in members:
            role = (row["kind"], row["size"], member["axis"], member["size"])
            roles.setdefault(member["parameter"], set()).add(role)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for parameter, taken in roles.items():
        start = _block_path(parameter)
        rest = parameter.removeprefix(start).split(".")
        pattern = tuple("*" if part.isdecimal() else part for part in rest)
        alike.setdefault((start, pattern, frozenset(taken)), []).append(parameter)
    return {
        parameter: found[0] if len(found) >= _ALIKE else parameter
        for found in alike.values()
        for parameter in found
    }


def _boxes(parameters: Sequence[Row], names: Mapping[str, str], path: str) -> tuple[Box, ...]:
    read = [row for row in parameters if names.get(row["name"]) == row["name"]]
    copies = Counter(names.values())
    begun = False
    boxes = []
    for row in read:
        in_block = not path or row["name"].startswith(f"{path}.")
        begun = begun or in_block
        part: Part = "block" if in_block else "after" if begun else "before"
        label = row["name"].removeprefix(f"{path}.") if path else row["name"]
        if copies[row["name"]] > 1:
            label = ".".join("*" if part.isdecimal() else part for part in label.split("."))
        boxes.append(
            Box(
                name=row["name"],
                label=label,
                module=label.partition(".")[0] if in_block and "." in label else "",
                shape=tuple(row["shape"]),
                part=part,
                copies=copies[row["name"]],
            )
        )
    return _framed(boxes)


def _framed(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """Bring the boxes of one module together; only a module of several boxes has a frame of its own."""
    order: dict[Part, int] = {"before": 0, "block": 1, "after": 2}
    modules = list(dict.fromkeys(box.module or box.name for box in boxes))
    many = Counter(box.module for box in boxes if box.module)
    together = sorted(boxes, key=lambda box: (order[box.part], modules.index(box.module or box.name)))
    return tuple(
        replace(box, label=box.label.removeprefix(f"{box.module}."))
        if many[box.module] > 1
        else replace(box, module="")
        for box in together
    )


def _bond(row: Row, members: list[Row], names: Mapping[str, str], parts: Mapping[str, Part]) -> Bond:
    ends = dict.fromkeys(End(names[m["parameter"]], m["axis"], m["side"]) for m in members)
    elsewhere = len(row["members"]) - len(members)
    return Bond(
        name=row["name"],
        kind=row["kind"],
        size=row["size"],
        prunable=row["prunable"],
        reason=row["reason"],
        parameters_per_unit=row["parameters_per_unit"],
        local=not elsewhere and len({parts[end.box] for end in ends}) == 1,
        ends=tuple(ends),
        elsewhere=elsewhere,
    )


def _bundled(bonds: Sequence[Bond]) -> list[Bond]:
    """Bundle what couples nothing and may not go, by kind and reason, so that it takes little room."""
    bundles: dict[tuple[Any, ...], list[Bond]] = {}
    for bond in bonds:
        lone = bond.local and not bond.prunable and len(bond.ends) == 1
        bundles.setdefault((bond.kind, bond.reason) if lone else (bond.name,), []).append(bond)
    return [
        replace(
            found[0],
            ends=tuple(end for bond in found for end in bond.ends),
            copies=sum(bond.copies for bond in found),
            bundle=len(found) > 1,
        )
        for found in bundles.values()
    ]
