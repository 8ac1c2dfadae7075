"""``groups.html``: node groups as a page to explore, which needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphprune.report.block import block_of, distinct_blocks
from graphprune.report.folding import Family, Row, fold, fold_members, fold_operators, numbers_in_words
from graphprune.report.group_document import Document
from graphprune.report.group_picture import group_picture
from graphprune.report.kinds import look_of, title_of
from graphprune.report.page import template

# Pictures of blocks that differ; a model whose blocks all differ would otherwise fill the page with them.
_PICTURES = 6


def render_group_page(document: Document) -> str:
    """Return the page as HTML.

    Args:
        document: The groups, as ``groups.json`` holds them. All texts are escaped: names are data, not markup.
    """
    families = fold(document["groups"])
    data = page_data(document, families)
    kinds = list(dict.fromkeys(family.first["kind"] for family in families))
    blocks = distinct_blocks(document)
    return template("groups.html.j2").render(
        document=document,
        facts=_facts(document),
        sections=_sections(data),
        kinds=[{"name": kind, "title": title_of(kind), "look": look_of(kind)} for kind in kinds],
        pictures=_pictures(document, blocks),
        left_out=max(0, len(blocks) - _PICTURES),
        kinds_index={kind: number for number, kind in enumerate(kinds)},
        data=data,
    )


def page_data(document: Document, families: Sequence[Family] | None = None) -> list[dict[str, Any]]:
    """Return the groups folded, so that alike ones share their data; ``*`` in a name stands for a number of its place.

    Args:
        document: The groups, as ``groups.json`` holds them.
        families: Its groups folded, if that has been done.
    """
    parameters = {row["name"]: row for row in document["parameters"]}
    total = document["elements"]["total"]
    families = fold(document["groups"]) if families is None else families
    return [_family(number, family, parameters, total) for number, family in enumerate(families)]


def _family(number: int, family: Family, parameters: dict[str, Row], total: int) -> dict[str, Any]:
    first, count = family.first, len(family.rows)
    owned = first["size"] * first["parameters_per_unit"] * count
    return {
        "id": number,
        "name": family.name,
        "where": family.where,
        "stack": family.stack,
        "kind": first["kind"],
        "title": title_of(first["kind"]),
        "unit": look_of(first["kind"]).unit,
        "size": first["size"],
        "minimum": first["minimum"],
        "permutable": first["permutable"],
        "prunable": first["prunable"],
        "reasons": list(family.reasons),
        "reason_of": [family.reasons.index(row["reason"]) if row["reason"] else None for row in family.rows],
        "parameters_per_unit": first["parameters_per_unit"],
        "block": [row["block"] for row in family.rows],
        "count": count,
        "places": [list(place) for place in family.places],
        "share": min(1.0, owned / total) if total else 0.0,
        "operators": [
            [target, family.pattern_of(f"{module}.").removesuffix("."), many]
            for target, module, many in fold_operators(first)
        ],
        "members": [_member(family, members, parameters) for members in fold_members(first)],
    }


def _member(family: Family, members: Any, parameters: dict[str, Row]) -> dict[str, Any]:
    first = members.first
    parameter = parameters[first["parameter"]]
    layout = parameter["layout"]
    return {
        "parameter": family.pattern_of(members.parameter),
        "places": [list(place) for place in members.places],
        "axis": first["axis"],
        "size": first["size"],
        "per_unit": first["per_unit"],
        "side": first["side"],
        "role": parameter["role"],
        "shape": parameter["shape"],
        "layout": layout[first["axis"]] if layout else [],
        "pieces": first["pieces"],
    }


def _facts(document: Document) -> dict[str, Any]:
    groups, elements = document["groups"], document["elements"]
    return {
        "groups": len(groups),
        "prunable": sum(row["prunable"] for row in groups),
        "total": elements["total"],
        "reached": elements["prunable"],
        "share": elements["prunable"] / elements["total"] if elements["total"] else 0.0,
    }


def _sections(data: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the folded groups by the stack of blocks that they lie in; those of the whole model first."""
    stacks = sorted(dict.fromkeys(family["stack"] for family in data), key=lambda stack: stack != "")
    sections = []
    for stack in stacks:
        families = [family for family in data if family["stack"] == stack]
        numbers = {block for family in families for block in family["block"] if block is not None}
        some = {family["id"]: _some_of(family, numbers) for family in families}
        sections.append(
            {"stack": stack, "blocks": len(numbers) if stack else 0, "families": families, "some": some}
        )
    return sections


def _some_of(family: dict[str, Any], numbers: set[int]) -> str:
    """Return in words which of the numbered blocks a family lies in, if it is more than one and not all."""
    own = {block for block in family["block"] if block is not None}
    return numbers_in_words(sorted(own)) if 1 < len(own) < len(numbers) else ""


def _pictures(document: Document, blocks: Sequence[tuple[str, ...]]) -> list[dict[str, str]]:
    """Return a picture of each kind of block, the most frequent first; one of the whole model if none is repeated."""
    if not blocks or len(blocks[0]) < 2:
        return [{"name": "model", "svg": main_picture(document)}]
    return [
        {"name": _blocks_text(paths), "svg": group_picture(document, _title(document, paths), block=paths[0])}
        for paths in blocks[:_PICTURES]
    ]


def main_picture(document: Document) -> str:
    """Return the picture of the most frequent kind of block, with its title; an empty string if there is no group."""
    drawn = block_of(document)
    return group_picture(document, _title(document, drawn.alike if drawn.path else ()))


def _title(document: Document, paths: Sequence[str]) -> str:
    words = f"Node groups of {document['model']}"
    if len(paths) > 1:
        return f"{words}: one of {len(paths)} alike blocks"
    return f"{words}: {paths[0]}" if paths else words


def _blocks_text(paths: Sequence[str]) -> str:
    stack = paths[0].rpartition(".")[0]
    numbers = numbers_in_words([int(path.rpartition(".")[2]) for path in paths])
    return f"{stack} {numbers}".strip()
