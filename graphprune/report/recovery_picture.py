"""Recovery round by round: what is still lost of each source, and the mix that followed from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from graphprune.report.schema import RecoveryRound
from graphprune.report.svg import INK, LINE, MUTED, colours, drawing, legible, to_svg

_LEGEND_COLUMNS, _MOST_TICKS = 5, 14
_PANELS, _LEGEND_ROW = 3.1, 0.18
"""Inches: all but the legend, and a row of it."""


def recovery_picture(rounds: Sequence[RecoveryRound | Mapping[str, Any]]) -> str:
    """Draw losses and mixes over the rounds; an empty string if there is none.

    Args:
        rounds: ``Report.recovery``, or rows of the same keys, in the order in which they were done.
    """
    rows = [RecoveryRound.model_validate(row) for row in rounds]
    if not rows:
        return ""
    paint = colours(list(rows[0].degradation))
    names = len(paint) + (len(paint) > 1)  # the mean's is one
    height = _PANELS + _LEGEND_ROW * ceil(names / _LEGEND_COLUMNS)
    with drawing("recovery", width=10, height=height) as figure:
        losses, mixes = figure.subplots(1, 2, width_ratios=[1.15, 1])
        _draw_losses(losses, rows, paint)
        _draw_mixes(mixes, rows, paint)
        for panel in (losses, mixes):
            _mark_phases(panel, rows)
        handles, labels = losses.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="lower center",
            ncols=min(_LEGEND_COLUMNS, len(labels)),
            handlelength=1.2,
            bbox_to_anchor=(0.5, 0),
        )
        figure.subplots_adjust(
            left=0.06,
            right=0.985,
            top=1 - 0.4 / height,
            bottom=(height - _PANELS + 0.65) / height,
            wspace=0.14,
        )
        return to_svg(figure, name="recovery", description=f"Recovery on {', '.join(paint)}")


def _draw_losses(axes: Axes, rows: Sequence[RecoveryRound], paint: Mapping[str, str]) -> None:
    places = range(len(rows))
    for name, colour in paint.items():
        values = [row.degradation[name] for row in rows]
        axes.plot(
            places, values, color=colour, linewidth=1.5, marker="o", markersize=3, label=legible(name, 24)
        )
    means = [float(np.mean(list(row.degradation.values()))) for row in rows]
    if len(paint) > 1:
        axes.plot(places, means, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)), label="mean")
    for place, row in enumerate(rows):
        if row.kept:
            axes.plot(place, means[place], "o", markersize=8, fillstyle="none", color=INK)
    axes.axhline(0, color=LINE, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(axis="y", linewidth=0.5, alpha=0.6)
    axes.set_xlim(-0.4, len(rows) - 0.6)
    better = any(value < 0 for row in rows for value in row.degradation.values())
    words = "nats per token; below 0: better" if better else "nats per token, held-out windows"
    axes.set_title("Loss above the dense model's", loc="left", fontsize=10, fontweight="bold")
    axes.set_title(words, loc="right", fontsize=8.5, color=MUTED)


def _draw_mixes(axes: Axes, rows: Sequence[RecoveryRound], paint: Mapping[str, str]) -> None:
    bottom = np.zeros(len(rows))
    for name, colour in paint.items():
        shares = np.array([row.mix.get(name, 0.0) for row in rows])
        axes.bar(range(len(rows)), shares, bottom=bottom, width=0.72, facecolor=colour, linewidth=0)
        bottom += shares
    axes.set(xlim=(-0.5, len(rows) - 0.5), ylim=(0, 1))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
    axes.set_title("Mix that each round trained on", loc="left", fontsize=10, fontweight="bold")


def _mark_phases(axes: Axes, rows: Sequence[RecoveryRound]) -> None:
    """Number the rounds, each phase from its own 0, and separate the phases."""
    every = ceil(len(rows) / _MOST_TICKS)
    starts = [place for place, row in enumerate(rows) if row.number == 0]
    shown = [
        place
        for place, row in enumerate(rows)
        if place in starts
        or (row.number % every == 0 and (every == 1 or all(abs(place - start) >= every for start in starts)))
    ]
    axes.set_xticks(shown, [str(rows[place].number) if rows[place].number else "start" for place in shown])
    axes.tick_params(length=2.5)
    phases = list(dict.fromkeys(row.phase for row in rows))
    axes.set_xlabel("round" if len(phases) == 1 else f"round ({', then '.join(phases)})")
    for place, row in enumerate(rows):
        if place and row.number == 0:
            axes.axvline(place - 0.5, color=LINE, linewidth=0.8, linestyle=(0, (3, 2)))
