"""The report's pictures as SVG: the widths of all layers, the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from graphprune.report.schema import Width
from graphprune.report.svg import FILL, LINE, MUTED, colours, drawing, legible, to_svg

# A curve is drawn as at most this many means, with the range around them, whatever the number of steps.
_POINTS = 120
_LOSS, _ZEROED = "#2f6fbd", "#c2701c"


def widths_picture(widths: Sequence[Width | Mapping[str, Any]]) -> str:
    """Draw the units of each pruned group before and after, a panel a kind; an empty string if there is none.

    Args:
        widths: ``Report.widths``, or rows of the same keys, in the order of the layers.
    """
    rows = [Width.model_validate(row) for row in widths]
    kinds = list(dict.fromkeys(row.kind for row in rows))
    if not rows:
        return ""
    paint = colours(kinds)
    height = 0.75 + 1.65 * len(kinds)
    with drawing("widths", width=10, height=height) as figure:
        panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
        for panel, kind in zip(panels, kinds, strict=True):
            _draw_widths(panel, kind, [row for row in rows if row.kind == kind], paint[kind])
        panels[-1].set_xlabel("layer")
        figure.subplots_adjust(
            left=0.065, right=0.985, top=1 - 0.35 / height, bottom=0.5 / height, hspace=0.55
        )
        return to_svg(
            figure, name="widths", description=f"Units before and after pruning: {', '.join(kinds)}"
        )


def _draw_widths(axes: Axes, kind: str, rows: Sequence[Width], colour: str) -> None:
    places = range(len(rows))
    before, after = [row.before for row in rows], [row.after for row in rows]
    axes.bar(places, before, width=0.72, facecolor=FILL, edgecolor=LINE, linewidth=0.8, label="before")
    axes.bar(places, after, width=0.72, facecolor=colour, linewidth=0, label="after")
    axes.set(xlim=(-0.7, len(rows) - 0.3), ylim=(0, max(1, *before, *after) * 1.04))
    if len(rows) <= 40:
        axes.set_xticks(list(places))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(length=2.5)
    axes.set_title(legible(kind, 60), loc="left", fontsize=10, fontweight="bold", parse_math=False)
    words = f"{_range(before)} → {_range(after)} units a layer"
    axes.set_title(words, loc="right", fontsize=8.5, color=MUTED)


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def training_picture(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Draw the losses of pruning and recovery; an empty string if no step has a finite loss.

    Args:
        metrics: Rows of ``metrics.jsonl``. A step that was run twice (after a resume) counts the last time.
    """
    stages = {stage: rows for stage in ("prune", "recover") if (rows := _rows_of(metrics, stage))}
    if not stages:
        return ""
    with drawing("training", width=10, height=3.1) as figure:
        longest = max(len(rows) for rows in stages.values())
        ratios = [max(len(rows), 0.4 * longest) for rows in stages.values()]
        panels = figure.subplots(1, len(stages), squeeze=False, width_ratios=ratios)[0]
        for panel, (stage, rows) in zip(panels, stages.items(), strict=True):
            _draw_loss(panel, rows)
            if stage == "prune":
                _draw_periods(panel, rows)
                _draw_zeroed(panel, rows)
            panel.set_xlabel("step (bands: pruning periods)" if stage == "prune" else "step")
            title = {"prune": "Pruning", "recover": "Recovery"}[stage]
            panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        panels[0].set_ylabel("loss", color=_LOSS)
        figure.subplots_adjust(
            left=0.06, right=0.985 if len(stages) > 1 else 0.93, top=0.88, bottom=0.16, wspace=0.26
        )
        return to_svg(figure, name="training", description=f"Training loss: {', '.join(stages)}")


def _rows_of(metrics: Sequence[Mapping[str, Any]], stage: str) -> list[Mapping[str, Any]]:
    by_step = {row["step"]: row for row in metrics if row["stage"] == stage and _is_finite(row.get("loss"))}
    return [by_step[step] for step in sorted(by_step)]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _draw_loss(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    points, wide = np.array([(row["step"], row["loss"]) for row in rows]), math.ceil(len(rows) / _POINTS)
    bins = [points[start : start + wide] for start in range(0, len(rows), wide)]
    steps = [part[:, 0].mean() for part in bins]
    losses = [part[:, 1].mean() for part in bins]
    lows, highs = [part[:, 1].min() for part in bins], [part[:, 1].max() for part in bins]
    if wide > 1:
        axes.fill_between(steps, lows, highs, color=_LOSS, alpha=0.18, linewidth=0)
    axes.plot(steps, losses, color=_LOSS, linewidth=1.5, marker="o" if len(rows) == 1 else "", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="y", linewidth=0.5, alpha=0.6)
    axes.tick_params(length=2.5)
    axes.margins(x=0.01)


def _draw_periods(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shade every second pruning period; one begins where the redundant set grows."""
    redundant = [row.get("redundant", 0) for row in rows]
    starts = [rows[0]["step"]]
    starts += [
        row["step"] for row, old, new in zip(rows[1:], redundant, redundant[1:], strict=False) if new > old
    ]
    bounds = [*starts, rows[-1]["step"]]
    for index, (left, right) in enumerate(pairwise(bounds)):
        if index % 2 == 1:
            axes.axvspan(left, right, facecolor=FILL, linewidth=0, zorder=0)
        if index:
            axes.axvline(left, color=LINE, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)


def _draw_zeroed(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw on a second axis which share of the units that are to go is zero."""
    points = [(row["step"], row["zeroed"] / row["target"]) for row in rows if row.get("target")]
    if not points:
        return
    kept = points[:: max(1, len(points) // (4 * _POINTS))]
    kept = kept if kept[-1] == points[-1] else [*kept, points[-1]]
    twin = axes.twinx()
    twin.plot(*zip(*kept, strict=True), color=_ZEROED, linewidth=1.5, drawstyle="steps-post")
    twin.set(ylim=(0, 1.03))
    twin.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    twin.spines["right"].set_visible(True)
    twin.tick_params(length=2.5)
    twin.set_title("units zeroed, share of the target", loc="right", fontsize=8.5, color=_ZEROED)
