"""Pictures are XML, the same twice, and name all that they show."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.report.block import block_of
from graphprune.report.pictures import group_picture, training_picture, widths_picture
from graphprune.report.schema import Report
from graphprune.report.svg import legible

SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(picture).iter(f"{SVG}text")]


def row(
    name: str,
    members: Sequence[tuple[str, int]],
    *,
    kind: str = "channels",
    size: int = 8,
    block: int | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "size": size,
        "block": block,
        "prunable": reason is None,
        "reason": reason,
        "parameters_per_unit": 12,
        "members": [{"parameter": p, "axis": axis, "size": size, "per_unit": 1} for p, axis in members],
    }


def test_pictures_are_xml_and_the_same_twice(
    report: Report, group_rows: list[dict[str, Any]], metrics: list[dict[str, Any]]
) -> None:
    drawers = [
        lambda: group_picture(group_rows, "One block"),
        lambda: widths_picture(report.widths),
        lambda: training_picture(metrics),
    ]
    for draw in drawers:
        picture = draw()
        assert ET.fromstring(picture).tag == f"{SVG}svg"
        assert picture == draw()
        assert "<dc:date>" not in picture
        assert len(picture) < 200_000


def test_block_shows_each_of_its_groups_and_parameters(group_rows: list[dict[str, Any]]) -> None:
    shown = texts(group_picture(group_rows, "Block seven", block=7))
    assert "Block seven" in shown
    for group in group_rows:
        label = group["name"].removeprefix("model.layers.7.")
        assert (label in shown) == (group["block"] in (None, 7))
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        assert shown.count(name) == 1
    assert "1,536" in shown
    legend = " ".join(shown)
    assert "ffn: prunable" in legend
    for group in group_rows[:2]:
        assert f"{group['kind']}: not prunable, {group['reason']}" in legend


def test_the_first_block_is_drawn_if_none_is_named(group_rows: list[dict[str, Any]]) -> None:
    local = {bond.name for bond in block_of(group_rows[::-1]).bonds if bond.local}
    assert local == {row["name"] for row in group_rows if row["block"] == 0}


def test_a_block_that_is_not_there_is_not_drawn(group_rows: list[dict[str, Any]]) -> None:
    assert group_picture(group_rows, "x", block=99) == ""


def test_two_stacks_with_the_same_numbers_stay_apart() -> None:
    hidden = [(f"{stack}.{i}.up.weight", 1) for stack in ("encoder", "decoder") for i in (0, 1)]
    groups = [row("hidden", hidden, kind="hidden")]
    groups += [
        row(f"{name.removesuffix('.up.weight')}:ffn", [(name, 0)], block=int(name[8])) for name, _ in hidden
    ]
    drawn = block_of(groups, 1)
    assert [bond.name for bond in drawn.bonds] == ["hidden", "encoder.1:ffn"]
    assert drawn.parameters == ("up.weight",)


def test_every_coupling_of_the_block_is_an_edge(group_rows: list[dict[str, Any]]) -> None:
    at = "model.layers.3."
    expected = {
        (group["name"], member["parameter"].removeprefix(at), member["axis"])
        for group in group_rows
        for member in group["members"]
        if member["parameter"].startswith(at)
    }
    drawn = block_of(group_rows, 3)
    assert {(bond.name, label, axis) for bond in drawn.bonds for label, axis in bond.ends} == expected
    assert {label for _, label, _ in expected} == set(drawn.parameters)
    hidden = next(bond for bond in drawn.bonds if bond.name == "model:hidden")
    assert len(hidden.ends) + hidden.elsewhere == len(group_rows[0]["members"])
    curves = re.findall(r'\nC [^"]*"[^>]*style="fill: none', group_picture(group_rows, "x", block=3))
    assert len(curves) == len(expected)


def test_unprunable_groups_are_hollow() -> None:
    members = [("layers.0.a.weight", 0), ("layers.0.b.weight", 1)]
    closed = group_picture([row("g", members, block=0, reason="softmax over this axis")], "x")
    free = group_picture([row("g", members, block=0)], "x")
    filled = '" style="fill: #2f6fbd'
    assert filled in free
    assert filled not in closed
    assert any("softmax over this axis" in text for text in texts(closed))


def test_alike_experts_are_folded_and_counted() -> None:
    groups = [row("hidden", [(f"layers.0.experts.{i}.up.weight", 1) for i in range(64)])]
    groups += [
        row(
            f"expert {i}",
            [(f"layers.0.experts.{i}.up.weight", 0), (f"layers.0.experts.{i}.down.weight", 1)],
            block=0,
        )
        for i in range(64)
    ]
    shown = texts(group_picture(groups, "x"))
    assert "experts.*.up.weight × 64" in shown
    assert "expert 0  × 64" in shown
    assert "expert 1" not in shown


def test_numbered_parameters_with_different_roles_stay_apart() -> None:
    groups = [row("channels", [("block.0.net.0.weight", 0), ("block.0.net.2.weight", 1)], block=0)]
    assert block_of(groups).parameters == ("net.0.weight", "net.2.weight")


def test_model_without_blocks_is_drawn_whole() -> None:
    groups = [
        row("a", [("first.weight", 0), ("second.weight", 1)]),
        row("b", [("second.weight", 0)], kind="outputs"),
    ]
    shown = texts(group_picture(groups, "x"))
    assert {"first.weight", "second.weight", "a", "b"} <= set(shown)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5, unique=True),
    reason=st.none() | st.text(max_size=300),
    seed=st.integers(0, 99),
)
def test_any_name_makes_a_picture_that_shows_it(names: list[str], reason: str | None, seed: int) -> None:
    draw = random.Random(seed)
    groups = [
        row(
            name,
            [(f"p{draw.randrange(6)}.weight", draw.randrange(2)) for _ in range(3)],
            kind=name,
            reason=reason,
        )
        for name in names
    ]
    picture = group_picture(groups, names[0])
    # XML allows leading blanks to be shown as they are, so compare without them.
    shown = {text.strip() for text in texts(picture)}
    assert {legible(name).strip() for name in names} <= shown


def test_circles_of_one_side_do_not_touch() -> None:
    groups = [
        row(f"rank {i}", [(f"layers.0.q.lora_{i}", 0), (f"layers.0.w{i}", 1)], block=0) for i in range(14)
    ]
    places = _label_places(group_picture(groups, "x"), "rank")
    assert len(places) == 14
    for side in {x for x, _ in places}:
        heights = sorted(y for x, y in places if x == side)
        assert heights[0] > 72
        assert all(below - above >= 72 for above, below in pairwise(heights))


def _label_places(picture: str, start: str) -> list[tuple[float, float]]:
    nodes = [
        node
        for node in ET.fromstring(picture).iter(f"{SVG}text")
        if "".join(node.itertext()).startswith(start)
    ]
    return [(float(node.attrib["x"]), float(node.attrib["y"])) for node in nodes]


def test_widths_state_what_became_of_each_kind(report: Report) -> None:
    shown = texts(widths_picture(report.widths))
    for kind in ("attention_heads", "ffn"):
        rows = [width for width in report.widths if width.kind == kind]
        least, most = min(width.after for width in rows), max(width.after for width in rows)
        after = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        assert kind in shown
        assert f"{rows[0].before:,} → {after} units a layer" in shown
    assert shown.count("29") == 2
    assert widths_picture([width.model_dump() for width in report.widths]) == widths_picture(report.widths)


def test_bars_are_as_high_as_the_widths() -> None:
    rows = [
        {"name": f"g{i}", "kind": "channels", "before": 100, "after": after}
        for i, after in enumerate((25, 50, 100))
    ]
    picture = widths_picture(rows)
    bars = re.findall(
        r'd="M ([\d.]+) ([\d.]+) \nL [\d.]+ [\d.]+ \nL [\d.]+ ([\d.]+) [^"]*"[^>]*fill: #2f6fbd', picture
    )
    heights = [float(low) - float(high) for _, low, high in bars]
    assert len(heights) == 3
    assert texts(picture).count("0") == 2  # the first layer, and where the bars stand
    assert heights[0] / heights[2] == pytest.approx(0.25, rel=1e-3)
    assert heights[1] / heights[2] == pytest.approx(0.5, rel=1e-3)


def test_training_shows_both_stages_and_the_periods(metrics: list[dict[str, Any]]) -> None:
    picture = training_picture(metrics)
    assert {"Pruning", "Recovery", "loss", "units zeroed, share of the target"} <= set(texts(picture))
    assert picture.count('style="fill: #f1f3f5') == 2  # of five periods, every second is shaded
    flat = [entry | {"redundant": 1} for entry in metrics]
    assert 'style="fill: #f1f3f5' not in training_picture(flat)


def test_one_stage_alone_is_drawn(metrics: list[dict[str, Any]]) -> None:
    only = [entry for entry in metrics if entry["stage"] == "recover"]
    shown = texts(training_picture(only))
    assert "Recovery" in shown
    assert "Pruning" not in shown


def test_nothing_to_draw_is_no_picture() -> None:
    assert training_picture([]) == ""
    assert training_picture([{"stage": "prune", "step": 0, "loss": float("nan")}]) == ""
    assert widths_picture([]) == ""
    assert group_picture([], "x") == ""


@settings(max_examples=15, deadline=None)
@given(
    losses=st.lists(st.floats() | st.none(), min_size=1, max_size=300),
    target=st.integers(min_value=0, max_value=5),
)
def test_any_metrics_can_be_drawn(losses: list[float | None], target: int) -> None:
    rows = [
        {"stage": "prune", "step": i, "loss": loss, "redundant": min(i, target), "zeroed": min(i, target)}
        | {"target": target, "learning_rate": 0.1}
        for i, loss in enumerate(losses)
        if loss is None or not 1e100 < abs(loss) < float("inf")
    ]
    picture = training_picture(rows)
    assert picture == "" or ET.fromstring(picture).tag == f"{SVG}svg"


def test_a_step_run_twice_counts_once_the_last_time(metrics: list[dict[str, Any]]) -> None:
    before = [entry | {"loss": 99.0} for entry in metrics[100:150]]
    resumed = metrics[:100] + before + metrics[100:]
    assert training_picture(resumed) == training_picture(metrics)
    assert training_picture(metrics[150:] + metrics[:150]) == training_picture(metrics)


def test_a_long_training_stays_a_small_picture() -> None:
    rows = [
        {
            "stage": "prune",
            "step": i,
            "loss": 1.0 + i % 7,
            "redundant": i // 5000,
            "zeroed": i,
            "target": 20000,
        }
        for i in range(20000)
    ]
    assert len(training_picture(rows)) < 120_000
