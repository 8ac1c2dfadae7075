"""The picture of recovery shows every source, every round and the mix that it trained on."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from graphprune.report.page import render_report
from graphprune.report.recovery_picture import recovery_picture
from graphprune.report.schema import Report

SVG = "{http://www.w3.org/2000/svg}"


def row(phase: str, number: int, mix: dict[str, float], kept: bool = False) -> dict[str, Any]:
    degradation = {"books": 0.5 / (1 + number), "<wiki>": 0.25, "asked": 0.1}
    losses = {name: 3 + value for name, value in degradation.items()}
    return {
        "phase": phase, "number": number, "step": 10 * number, "mix": mix, "losses": losses,
        "degradation": degradation, "kept": kept,
    }  # fmt: skip


ROUNDS = [
    row("text", 0, {}),
    row("text", 1, {"books": 0.75, "<wiki>": 0.25}),
    row("instruct", 0, {}),
    row("instruct", 1, {"asked": 1.0}, kept=True),
]


def texts(picture: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(picture).iter(f"{SVG}text")]


def test_the_picture_names_sources_rounds_and_phases() -> None:
    picture = recovery_picture(ROUNDS)
    shown = texts(picture)
    assert {"books", "<wiki>", "asked", "mean", "round (text, then instruct)"} <= set(shown)
    assert shown.count("start") == shown.count("1") == 4  # of two phases in two panels
    assert picture == recovery_picture(ROUNDS)
    assert len(picture) < 100_000


def test_bars_are_as_high_as_the_shares() -> None:
    picture = recovery_picture(ROUNDS)
    panel = picture[picture.index('id="recovery-axes_2"') : picture.index('id="recovery-legend')]
    bars = re.findall(
        r'd="M [\d.]+ ([\d.]+) \nL [\d.]+ [\d.]+ \nL [\d.]+ ([\d.]+) [^"]*"[^>]*fill: #[^>]*', panel
    )
    heights = sorted(high for low, top in bars if (high := float(low) - float(top)) > 1e-6)
    assert [height / heights[-1] for height in heights] == pytest.approx([0.25, 0.75, 1], rel=1e-3)


def test_one_source_is_its_own_mean() -> None:
    one = [entry | {"degradation": {"books": 0.1}, "losses": {"books": 3.1}} for entry in ROUNDS[:2]]
    shown = texts(
        recovery_picture([entry | {"mix": {"books": 1.0} if entry["mix"] else {}} for entry in one])
    )
    assert "mean" not in shown
    assert "round" in shown


def test_no_rounds_are_no_picture() -> None:
    assert recovery_picture([]) == ""


def test_the_page_shows_the_picture_beside_the_training(data: dict[str, Any]) -> None:
    report = Report.model_validate(data | {"recovery": ROUNDS})
    page = render_report(report, {"recovery": recovery_picture(report.recovery)})
    assert "the mix that the round trained on" in page
    assert "&lt;wiki&gt;" in page
    assert "<wiki>" not in page
    assert "the mix that the round trained on" not in render_report(
        Report.model_validate(data), {"recovery": ""}
    )


def test_perplexities_stand_in_the_order_of_the_stages(data: dict[str, Any]) -> None:
    page = render_report(Report.model_validate(data), {})
    assert page.index("after quantization") < page.index("after recovery")
    swapped = render_report(Report.model_validate(data | {"stages": data["stages"][::-1]}), {})
    assert swapped.index("after recovery") < swapped.index("after quantization")


@pytest.mark.parametrize("change", [{"mix": {"books": 1.2}}, {"number": -1}, {"losses": {"a": float("nan")}}])
def test_rounds_that_cannot_be_are_refused(data: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate(data | {"recovery": [ROUNDS[0] | change]})


def many(sources: int, rounds: int, least: float) -> str:
    """Draw sources with long names over rounds of two phases."""
    names = [f"source number {place:02}, long" for place in range(sources)]
    rows = []
    for phase in ("text", "instruct"):
        for number in range(rounds):
            degradation = {name: least + place / 10 for place, name in enumerate(names)}
            losses = {name: 3 + value for name, value in degradation.items()}
            mix = dict.fromkeys(names, 1 / sources) if number else {}
            rows.append(row(phase, number, mix) | {"losses": losses, "degradation": degradation, "mix": mix})
    return recovery_picture(rows)


def places(picture: str) -> list[tuple[str, float, float]]:
    """Return the texts of a picture with where they stand, in points."""
    found = []
    for node in ET.fromstring(picture).iter(f"{SVG}text"):
        x, y = (node.get("x"), node.get("y"))
        if x is None:
            x, y = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", node.get("transform", ""))[0]
        found.append(("".join(node.itertext()), float(x), float(y)))
    return found


@pytest.mark.parametrize("sources", [1, 4, 13])
def test_the_legend_stands_below_the_axes_and_within_the_picture(sources: int) -> None:
    picture = many(sources, 3, 0.1)
    shown = places(picture)
    lowest = max(y for text, _, y in shown if text.startswith("round"))
    legend = [y for text, _, y in shown if text.startswith("source number") or text == "mean"]
    assert len(legend) == sources + (sources > 1)
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', picture)[0])
    assert lowest + 10 < min(legend) <= max(legend) < height


def test_rounds_have_room_for_their_numbers() -> None:
    shown = places(many(2, 14, 0.1))
    ticks = sorted(x for text, x, _ in shown if text == "start" or text.isdigit())
    assert len(ticks) >= 8
    assert min(after - before for before, after in pairwise(ticks)) > 15


def test_what_is_better_than_the_dense_model_is_called_so(data: dict[str, Any]) -> None:
    assert "nats per token; below 0: better" in texts(many(2, 3, -0.2))
    assert "nats per token, held-out windows" in texts(many(2, 3, 0.2))
    rows = [row("text", 0, {}), row("text", 1, {"books": 1.0})]
    rows[1]["degradation"] = {"books": -0.03, "<wiki>": 0.25, "asked": 0.1}
    page = render_report(Report.model_validate(data | {"recovery": rows}), {"recovery": "<svg/>"})
    assert ">0.03 below</data>" in page
    assert ">0.25 above</data>" in page
