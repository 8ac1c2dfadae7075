"""The coupling of one block: its parameters in the middle, the node groups that bind them on both sides."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch
from matplotlib.path import Path

from graphprune.report.block import Block, Bond, block_of
from graphprune.report.svg import FILL, INK, LINE, MUTED, PAPER, colours, drawing, legible, to_svg

# Inches. The page shows the picture about 9 inches wide, so a point here is nearly a point there.
_WIDTH, _ROW, _GAP, _PORT, _CIRCLE, _PITCH = 10.0, 0.44, 0.16, 0.14, 0.36, 1.5
_LEFT, _BOX_LEFT, _BOX_RIGHT, _RIGHT = 1.35, 3.35, 6.65, 8.65
_TOP, _LEGEND_ROW = 0.85, 0.23
# Not the paper's white, which turns dark where the reader prefers dark pages.
_ON_COLOUR = "#fefefe"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where things stand, in inches from the top left corner."""

    boxes: dict[str, float]
    circles: dict[str, tuple[float, float]]
    ports: dict[tuple[float, str, int], float]
    bottom: float


def group_picture(groups: Sequence[Mapping[str, Any]], title: str, *, block: int | None = None) -> str:
    """Draw the group graph of one block as SVG; an empty string if there is no group.

    Args:
        groups: Rows of ``groups.json``; those of several blocks may be given.
        title: Shown above the picture.
        block: The block to draw; the first one by default. Groups that belong to no block (a hidden dimension
            that runs through the model) are drawn with their members in this block.
    """
    drawn = block_of(groups, block)
    if not drawn.bonds:
        return ""
    paint = colours([bond.kind for bond in drawn.bonds])
    layout, legend = _layout(drawn), _legend(drawn)
    height = layout.bottom + 0.3 + _LEGEND_ROW * len(legend) + 0.2
    with drawing("groups", width=_WIDTH, height=height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
        axes.axis("off")
        _text(axes, 0.3, 0.4, title, size=11, weight="bold")
        for bond in drawn.bonds:
            _draw_edges(axes, bond, layout, paint[bond.kind])
        for label in drawn.parameters:
            _draw_box(axes, label, layout)
        for bond in drawn.bonds:
            _draw_circle(axes, bond, layout.circles[bond.name], paint[bond.kind])
        _draw_legend(axes, legend, layout.bottom + 0.3, paint)
        return to_svg(figure, name="groups", description=title)


def _layout(block: Block) -> _Layout:
    boxes, sides = _stack(block.parameters), _sides(block)
    stacked = max(boxes.values()) + _ROW / 2 - _TOP
    depth = max(stacked, *(_PITCH * len(bonds) - 0.2 for bonds in sides.values()))
    boxes = {label: place + (depth - stacked) / 2 for label, place in boxes.items()}
    circles: dict[str, tuple[float, float]] = {}
    ends: dict[tuple[float, str], set[int]] = {}
    for x, bonds in sides.items():
        wanted = {bond.name: sum(boxes[label] for label, _ in bond.ends) / len(bond.ends) for bond in bonds}
        places = _spread(wanted, first=_TOP + _CIRCLE, last=_TOP + depth - 0.9)
        circles |= {name: (x, place) for name, place in places.items()}
        side = _BOX_LEFT if x == _LEFT else _BOX_RIGHT
        for label, axis in (end for bond in bonds for end in bond.ends):
            ends.setdefault((side, label), set()).add(axis)
    ports = {
        (side, label, axis): boxes[label] + _PORT * (row - (len(taken) - 1) / 2)
        for (side, label), taken in ends.items()
        for row, axis in enumerate(sorted(taken))
    }
    return _Layout(boxes=boxes, circles=circles, ports=ports, bottom=_TOP + depth)


def _stack(labels: Sequence[str]) -> dict[str, float]:
    """Return the middle of each box, from top to bottom, a little apart where another module begins."""
    boxes: dict[str, float] = {}
    y, module = _TOP, labels[0].partition(".")[0]
    for label in labels:
        if label.partition(".")[0] != module:
            module = label.partition(".")[0]
            y += _GAP
        boxes[label] = y + _ROW / 2
        y += _ROW
    return boxes


def _sides(block: Block) -> dict[float, list[Bond]]:
    """Return the groups by column: those that run through the model left, those of the block right."""
    left = [bond for bond in block.bonds if not bond.local]
    right = [bond for bond in block.bonds if bond.local]
    if not left or not right:
        widest = max(block.bonds, key=lambda bond: len(bond.ends))
        left, right = [widest], [bond for bond in block.bonds if bond is not widest]
    return {_LEFT: left, _RIGHT: right}


def _spread(wanted: dict[str, float], first: float, last: float) -> dict[str, float]:
    """Return places near the wanted ones, in their order, at least a pitch apart."""
    places = dict(sorted(wanted.items(), key=lambda item: item[1]))
    least = first
    for name in places:
        places[name] = max(places[name], least)
        least = places[name] + _PITCH
    most = last
    for name in reversed(places):
        places[name] = min(places[name], most)
        most = places[name] - _PITCH
    return places


def _draw_edges(axes: Axes, bond: Bond, layout: _Layout, colour: str) -> None:
    x, y = layout.circles[bond.name]
    side = _BOX_LEFT if x < _BOX_LEFT else _BOX_RIGHT
    start = x + (_CIRCLE if side == _BOX_LEFT else -_CIRCLE)
    bend = 0.55 * (side - start)
    for label, axis in bond.ends:
        end = layout.ports[side, label, axis]
        points = [(start, y), (start + bend, y), (side - bend, end), (side, end)]
        curve = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
        line = "-" if bond.prunable else (0, (4, 2))
        axes.add_patch(PathPatch(curve, fill=False, linewidth=1.3, edgecolor=colour, linestyle=line))


def _draw_box(axes: Axes, label: str, layout: _Layout) -> None:
    y, height, width = layout.boxes[label], _ROW - 0.1, _BOX_RIGHT - _BOX_LEFT
    corner, shape = (_BOX_LEFT, y - height / 2), "round,pad=0,rounding_size=0.06"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=FILL, edgecolor=LINE, linewidth=0.8)
    )
    _text(axes, (_BOX_LEFT + _BOX_RIGHT) / 2, y, label, most=32, anchor="center")
    for (side, owner, axis), port in layout.ports.items():
        if owner == label:
            x, anchor = (side + 0.08, "left") if side == _BOX_LEFT else (side - 0.08, "right")
            _text(axes, x, port, f"axis {axis}", size=6.5, colour=MUTED, anchor=anchor)


def _draw_circle(axes: Axes, bond: Bond, place: tuple[float, float], colour: str) -> None:
    x, y = place
    axes.add_patch(
        Circle(
            place,
            _CIRCLE,
            facecolor=colour if bond.prunable else PAPER,
            edgecolor=colour,
            linewidth=1.6,
            linestyle="-" if bond.prunable else (0, (3, 2)),
        )
    )
    inside = _ON_COLOUR if bond.prunable else INK
    _text(axes, x, y, f"{bond.size:,}", size=10, weight="bold", colour=inside, anchor="center")
    many = f"  × {bond.copies}" if bond.copies > 1 else ""
    lines = [f"{bond.parameters_per_unit:,} parameters a unit"]
    if bond.elsewhere:
        lines.append(f"+ {bond.elsewhere:,} members elsewhere")
    _text(axes, x, y + _CIRCLE + 0.16, legible(bond.label, 32) + many, weight="bold", anchor="center")
    for row, line in enumerate(lines):
        _text(axes, x, y + _CIRCLE + 0.34 + 0.16 * row, line, size=7.5, colour=MUTED, anchor="center")


def _legend(block: Block) -> list[tuple[Bond | None, str]]:
    """Return the lines of the legend: a bond whose circle to show, or None to go on with the text above."""
    lines: list[tuple[Bond | None, str]] = []
    shown: set[tuple[str, str | None]] = set()
    for bond in block.bonds:
        reason = None if bond.prunable else (bond.reason or "no reason given")
        if (bond.kind, reason) in shown:
            continue
        shown.add((bond.kind, reason))
        text = f"{bond.kind}: prunable" if reason is None else f"{bond.kind}: not prunable, {reason}"
        wrapped = textwrap.wrap(legible(text), 118, max_lines=3, placeholder=" …")
        lines += [(bond if row == 0 else None, line) for row, line in enumerate(wrapped)]
    return lines


def _draw_legend(axes: Axes, lines: list[tuple[Bond | None, str]], top: float, paint: dict[str, str]) -> None:
    for row, (bond, line) in enumerate(lines):
        y = top + _LEGEND_ROW * row
        if bond is not None:
            face = paint[bond.kind] if bond.prunable else PAPER
            axes.add_patch(Circle((0.42, y), 0.07, facecolor=face, edgecolor=paint[bond.kind], linewidth=1.3))
        _text(axes, 0.62, y, line, size=8, colour=INK)


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = 8.5,
    weight: str = "normal",
    colour: str = INK,
    anchor: str = "left",
    most: int | None = None,
) -> None:
    """Write one line; names are data, so a dollar sign in them is no formula."""
    axes.text(
        x,
        y,
        legible(text, most),
        fontsize=size,
        fontweight=weight,
        color=colour,
        horizontalalignment=anchor,
        verticalalignment="center",
        parse_math=False,
    )
