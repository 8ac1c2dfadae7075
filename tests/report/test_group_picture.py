"""The picture of a block is XML, the same twice, names all that it shows, and lays nothing upon another."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from typing import Any

import pytest
from group_documents import document_of, group, make_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.report.block import block_of, distinct_blocks
from graphprune.report.bus_layout import TOP, lay_out, wrapped
from graphprune.report.group_picture import group_picture
from graphprune.report.kinds import look_of
from graphprune.report.svg import legible

SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(picture).iter(f"{SVG}text")]


def names(picture: str) -> list[str]:
    return [
        node.attrib["data-group"] for node in ET.fromstring(picture).iter() if "data-group" in node.attrib
    ]


def test_it_is_xml_and_the_same_twice(document: dict[str, Any]) -> None:
    picture = group_picture(document, "One block")
    assert ET.fromstring(picture).tag == f"{SVG}svg"
    assert picture == group_picture(document, "One block")
    assert len(picture) < 100_000


def test_a_block_shows_each_of_its_groups_and_parameters(document: dict[str, Any]) -> None:
    picture = group_picture(document, "Block seven", block="model.layers.7")
    shown = texts(picture)
    assert "Block seven" in shown
    expected = {row["name"] for row in document["groups"] if row["block"] in (None, 7)}
    assert set(names(picture)) == expected
    for name in ("q_proj.weight", "down_proj.weight", "input_layernorm.weight", "self_attn", "mlp"):
        assert shown.count(name) == 1
    assert "model.embed_tokens.weight" in shown
    assert "1,536 units of 1,728 parameters" in shown
    for row in document["groups"][:2]:
        assert f"stays: {row['reason']}" in " ".join(shown)


def test_the_most_frequent_block_is_drawn_if_none_is_named() -> None:
    rows = make_groups(4)
    rows[2]["size"] += 1  # block 0 is the odd one
    assert distinct_blocks(document_of(rows)) == [
        ("model.layers.1", "model.layers.2", "model.layers.3"),
        ("model.layers.0",),
    ]
    drawn = block_of(document_of(rows))
    assert drawn.path == "model.layers.1"
    assert len(drawn.alike) == 3


def test_two_stacks_with_the_same_numbers_stay_apart() -> None:
    hidden = [(f"{stack}.{i}.up.weight", 1) for stack in ("encoder", "decoder") for i in (0, 1)]
    rows = [group("hidden", "hidden", 8, None, hidden)]
    rows += [group(f"{p.removesuffix('.weight')}:ffn", "ffn", 9, int(p[8]), [(p, 0)]) for p, _ in hidden]
    drawn = block_of(document_of(rows), "encoder.1")
    assert drawn.alike == ("encoder.0", "encoder.1")
    assert {bond.name for bond in drawn.bonds} == {"hidden", "encoder.1.up:ffn"}
    assert [box.name for box in drawn.boxes] == ["encoder.1.up.weight"]


def test_every_coupling_of_the_block_is_an_end(document: dict[str, Any]) -> None:
    at = "model.layers.3."
    expected = {
        (row["name"], member["parameter"], member["axis"])
        for row in document["groups"]
        for member in row["members"]
        if member["parameter"].startswith(at) or ".layers." not in member["parameter"]
    }
    drawn = block_of(document, at[:-1])
    assert {(bond.name, end.box, end.axis) for bond in drawn.bonds for end in bond.ends} == expected
    hidden = next(bond for bond in drawn.bonds if bond.name == "model:hidden")
    assert len(hidden.ends) + hidden.elsewhere == len(document["groups"][0]["members"])
    picture = ET.fromstring(group_picture(document, "x", block=at[:-1]))
    assert sum(1 for _ in picture.iter(f"{SVG}circle")) == len(expected)


def test_what_stands_before_and_after_the_blocks_is_drawn_there() -> None:
    ends = [("embed.weight", 1), *((f"layers.{i}.up.weight", 1) for i in range(3)), ("norm.weight", 0)]
    rows = [group("hidden", "hidden", 8, None, ends)]
    rows += [group(f"layers.{i}.up:ffn", "ffn", 9, i, [(f"layers.{i}.up.weight", 0)]) for i in range(3)]
    drawn = block_of(document_of(rows))
    assert [(box.name, box.part) for box in drawn.boxes] == [
        ("embed.weight", "before"),
        ("layers.0.up.weight", "block"),
        ("norm.weight", "after"),
    ]


def test_groups_of_other_blocks_are_left_out_although_they_share_a_buffer() -> None:
    shared = ("rotary.inv_freq", 0)
    rows = [group(f"l.{i}:head_dim", "head_dim", 8, i, [(f"l.{i}.q", 0), shared]) for i in range(3)]
    for row in rows:
        row["members"][1] |= {"role": "buffer", "side": "selected"}
    picture = group_picture(document_of(rows), "x", block="l.1")
    assert names(picture) == ["l.1:head_dim"]
    assert {"rotary.inv_freq", "q"} <= set(texts(picture))
    assert picture.count("Z") == 1  # one arrow: out of the weight, none for the shared buffer


def test_groups_that_stay_are_dashed_and_hollow() -> None:
    members = [("a.weight", 0), ("b.weight", 1)]
    closed = group_picture(document_of([group("g", "ffn", 8, None, members, "softmax over this axis")]), "x")
    free = group_picture(document_of([group("g", "ffn", 8, None, members)]), "x")
    filled = f'<circle class="kind-ffn-fill kind-ffn-line" fill="{look_of("ffn").light}"'
    assert free.count(filled) == 2
    assert filled not in closed
    assert "dasharray" in closed
    assert "dasharray" not in free
    assert any("softmax over this axis" in text for text in texts(closed))


def test_alike_experts_are_folded_and_counted() -> None:
    rows = [group("hidden", "hidden", 8, None, [(f"layers.0.experts.{i}.up.weight", 1) for i in range(64)])]
    rows += [
        group(
            f"layers.0.experts.{i}:ffn",
            "ffn",
            8,
            0,
            [(f"layers.0.experts.{i}.up.weight", 0), (f"layers.0.experts.{i}.down.weight", 1)],
        )
        for i in range(64)
    ]
    picture = group_picture(document_of(rows), "x")
    assert {"*.up.weight × 64", "ffn × 64"} <= set(texts(picture))
    assert set(names(picture)) == {"hidden", "layers.0.experts.0:ffn"}


def test_what_couples_nothing_and_stays_is_bundled_by_reason() -> None:
    rows = [group(f"g{i}", "other", i + 2, None, [("w", i)], "opaque" if i < 3 else "read") for i in range(4)]
    rows.append(group("free", "other", 9, None, [("v", 0)]))
    drawn = block_of(document_of(rows))
    assert [(bond.copies, len(bond.ends), bond.bundle) for bond in drawn.bonds] == [
        (3, 3, True),
        (1, 1, False),
        (1, 1, False),
    ]


def test_numbered_parameters_with_different_roles_stay_apart() -> None:
    rows = [group("c", "ffn", 8, 0, [("block.0.net.0.weight", 0), ("block.0.net.2.weight", 1)])]
    assert len(block_of(document_of(rows)).boxes) == 2


def test_long_names_keep_their_end_and_stand_in_full_as_a_title() -> None:
    long = "a" * 90 + ".the_end"
    picture = group_picture(document_of([group("g", "ffn", 8, None, [(long, 0)])]), "x")
    assert any(text.startswith("…") and text.endswith("the_end") for text in texts(picture))
    titles = ["".join(node.itertext()) for node in ET.fromstring(picture).iter(f"{SVG}title")]
    assert any(title.startswith(long) for title in titles)


@settings(max_examples=25)
@given(
    labels=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5, unique=True),
    reason=st.none() | st.text(max_size=300),
    seed=st.integers(0, 99),
)
def test_any_name_makes_a_picture_that_holds_it(labels: list[str], reason: str | None, seed: int) -> None:
    draw = random.Random(seed)
    rows = [
        group(
            label,
            "lone",
            4,
            None,
            [(f"p{draw.randrange(6)}.weight", draw.randrange(2)) for _ in range(3)],
            reason,
        )
        for label in labels
    ]
    for row in rows:
        row["kind"] = row["name"]
    shown = names(group_picture(document_of(rows), labels[0]))
    assert set(shown) <= {legible(label) for label in labels}
    assert shown


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_nothing_lies_upon_another(seed: int) -> None:
    """Boxes, cards, and the buses of one lane keep apart, whatever the groups are."""
    draw = random.Random(seed)
    rows = []
    for number in range(draw.randrange(1, 14)):
        members = {
            (f"layers.{draw.randrange(2)}.m{draw.randrange(3)}.w{draw.randrange(5)}", draw.randrange(3))
            for _ in range(draw.randrange(1, 6))
        }
        reason = draw.choice(
            [None, "a reason that is long enough to be wrapped over several lines of the card"]
        )
        rows.append(group(f"g{number}", draw.choice(["ffn", "hidden"]), 4, None, sorted(members), reason))
    picture = lay_out(block_of(document_of(rows)))
    spans = [(placed.top, placed.top + placed.height) for placed in picture.boxes]
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    for one, other in combinations(picture.buses, 2):
        if one.side == other.side:
            assert one.card + one.card_height <= other.card or other.card + other.card_height <= one.card
            if one.x == other.x:
                assert one.span[1] < other.span[0] or other.span[1] < one.span[0]
    for bus in picture.buses:
        assert bus.card >= TOP - 6
        assert bus.card + bus.card_height <= picture.height
        assert 0 < bus.x < picture.width
        low, high = bus.span
        assert all(low <= stop.y <= high for stop in bus.stops)


@given(text=st.text(alphabet="ab ._/", min_size=1, max_size=200), width=st.integers(4, 40))
def test_wrapping_loses_nothing_but_blanks(text: str, width: int) -> None:
    lines = wrapped(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(len(line) <= width for line in lines)


def test_an_operator_is_broken_behind_its_dots() -> None:
    lines = wrapped("stays: operator transformers.grouped_mm_fallback.default has no rule", 36)
    assert all(line == line.strip() and len(line) <= 36 for line in lines)
    assert all(re.search(r"([._]|\b)$", line) for line in lines)


def test_nothing_to_draw_is_no_picture() -> None:
    assert group_picture(document_of([]), "x") == ""
    assert group_picture(document_of(make_groups(2)), "x", block="model.layers.99") == ""


@pytest.mark.parametrize("page", ["#ffffff", "#12161b"])
def test_the_colours_of_kinds_stand_out(page: str) -> None:
    kinds = (
        "hidden",
        "attention_heads",
        "query_heads",
        "head_dim",
        "ffn",
        "expert",
        "lora_rank",
        "vocabulary",
        "other",
    )
    for kind in kinds:
        colour = look_of(kind).light if page == "#ffffff" else look_of(kind).dark
        lighter, darker = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
