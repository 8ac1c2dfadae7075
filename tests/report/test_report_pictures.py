"""Pictures are XML, the same twice, and name all that they show."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.report.pictures import training_picture, widths_picture
from graphprune.report.schema import Report

SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(picture).iter(f"{SVG}text")]


def test_pictures_are_xml_and_the_same_twice(report: Report, metrics: list[dict[str, Any]]) -> None:
    drawers = [
        lambda: widths_picture(report.widths),
        lambda: training_picture(metrics),
    ]
    for draw in drawers:
        picture = draw()
        assert ET.fromstring(picture).tag == f"{SVG}svg"
        assert picture == draw()
        assert "<dc:date>" not in picture
        assert len(picture) < 200_000


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
