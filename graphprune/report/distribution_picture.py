"""The knowledge distribution as heat maps: which layers the loss hangs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

from graphprune.report.svg import FILL, MUTED, drawing, legible, to_svg

_HEAT = LinearSegmentedColormap.from_list("heat", ["#f7e7c6", "#e08a3c", "#8c1d2f"])


def distribution_picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw how much the loss rises when each group alone loses units, a panel a kind; empty if there is none.

    A column is a group, a row of cells a share of its units. Colours are the rise in nats a token, on one scale for
    all panels, by its root: a few groups matter many times more than the rest.

    Args:
        rows: In the order of the layers, each with ``name``, ``kind``, ``size``, ``removed`` and ``rises``.
    """
    if not rows:
        return ""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    largest = max(max(row["rises"]) for row in rows)
    height = 0.55 + 1.25 * len(kinds)
    with drawing("distribution", width=10, height=height) as figure:
        panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
        for panel, kind in zip(panels, kinds, strict=True):
            _draw(panel, kind, [row for row in rows if row["kind"] == kind], max(largest, 1e-12))
        panels[-1].set_xlabel("layer")
        figure.subplots_adjust(
            left=0.065, right=0.985, top=1 - 0.35 / height, bottom=0.5 / height, hspace=0.75
        )
        return to_svg(
            figure, name="distribution", description=f"Rise of the loss by group: {', '.join(kinds)}"
        )


def _draw(axes: Axes, kind: str, rows: Sequence[Mapping[str, Any]], largest: float) -> None:
    shares = sorted({round(count / row["size"], 3) for row in rows for count in row["removed"]})
    scale = Normalize(0, np.sqrt(largest))
    for place, row in enumerate(rows):
        for count, rise in zip(row["removed"], row["rises"], strict=True):
            level = shares.index(round(count / row["size"], 3))
            colour = _HEAT(scale(np.sqrt(max(rise, 0.0))))
            axes.add_patch(
                Rectangle((place - 0.5, level - 0.5), 1, 1, facecolor=colour, edgecolor=FILL, linewidth=0.6)
            )
    axes.set(xlim=(-0.5, len(rows) - 0.5), ylim=(-0.5, len(shares) - 0.5))
    axes.set_yticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    if len(rows) <= 40:
        axes.set_xticks(range(len(rows)))
    axes.tick_params(length=2.5)
    axes.set_title(legible(kind, 32), loc="left", fontsize=10, fontweight="bold", parse_math=False)
    worst = max(rows, key=lambda row: max(row["rises"]))
    rise = max(worst["rises"])
    words = f"at most {rise:+.3g} nats a token, {legible(str(worst['name']), 52)}"
    if rise < 0:
        words = f"nowhere worse than dense: {-rise:.3g} nats a token less, or more"
    axes.set_title(words, loc="right", fontsize=8.5, color=MUTED, parse_math=False)
