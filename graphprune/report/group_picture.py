"""The coupling of one block: its parameters in the middle, the node groups as buses on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from xml.sax.saxutils import escape, quoteattr

from graphprune.report.block import Bond, block_of
from graphprune.report.bus_layout import (
    CAPTION,
    CARD,
    INSET,
    LINE,
    MARGIN,
    NAME,
    OUTSET,
    SHAPE,
    Bus,
    Frame,
    Picture,
    PlacedBox,
    Stop,
    box_text,
    lay_out,
    shape_text,
)
from graphprune.report.group_document import Document
from graphprune.report.kinds import look_of
from graphprune.report.svg import FILL, INK, MUTED, PAPER, legible
from graphprune.report.svg import LINE as RULE

_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
_MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_EXPLANATION = (
    "A vertical line is a node group: a unit leaves every parameter on its line, or none. "
    "Solid: may go. Dashed: stays."
)
_ARROWS = (
    "Small numbers are axes. An arrow into a parameter: it is summed over that axis; "
    "out of it: its result lies along it."
)
_DARK = {"ink": "#e6edf3", "muted": "#9aa3ad", "rule": "#434c56", "fill": "#1b2128", "paper": "#12161b"}
_FIXED = {"ink": INK, "muted": MUTED, "rule": RULE, "fill": FILL, "paper": PAPER}


def group_picture(document: Document, title: str, *, block: str | None = None) -> str:
    """Draw one block as SVG; an empty string if there is no group.

    A vertical line is a node group. Where it meets a box, the axis of that parameter is made of the group's units,
    so that a unit leaves all boxes on its line or none.

    Args:
        document: The groups, as ``groups.json`` holds them.
        title: Shown above the picture.
        block: The path of the block, such as ``model.layers.3``; by default the first of the most frequent ones.
            What belongs to no block (embeddings, the last norm) is drawn before and after it.
    """
    drawn = block_of(document, block)
    if not drawn.bonds:
        return ""
    picture = lay_out(drawn)
    kinds = dict.fromkeys(bond.kind for bond in drawn.bonds)
    size = f"{picture.width:.0f} {picture.height:.0f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="node-groups" viewBox="0 0 {size}" role="img" '
        f'width="{picture.width:.0f}" height="{picture.height:.0f}" aria-label={quoteattr(legible(title))}>',
        f"<style>{_style(kinds)}</style>",
        f'<rect class="paper-fill" width="100%" height="100%" fill="{PAPER}"/>',
        _text(MARGIN, 36, title, size=17, weight=650),
        _text(MARGIN, 57, _EXPLANATION, size=12, tone="muted"),
        *(_frame(frame, picture) for frame in sorted(picture.frames, key=lambda frame: frame.inner)),
        *(_bus(bus, picture) for bus in picture.buses),
        *(_box(placed, picture) for placed in picture.boxes),
        _text(MARGIN, picture.height - 18, _ARROWS, size=11, tone="muted"),
        "</svg>",
    ]
    return "\n".join(parts)


def _style(kinds: Iterable[str]) -> str:
    """Return what repaints the picture on dark pages; the light colours stand in the elements themselves."""
    dark = [f".node-groups .{tone}-fill {{ fill: {colour} }}" for tone, colour in _DARK.items()]
    dark += [f".node-groups .{tone}-line {{ stroke: {colour} }}" for tone, colour in _DARK.items()]
    for kind in kinds:
        name, colour = _class(kind), look_of(kind).dark
        dark += [
            f".node-groups .{name}-fill {{ fill: {colour} }}",
            f".node-groups .{name}-line {{ stroke: {colour} }}",
        ]
    return f"@media (prefers-color-scheme: dark) {{ {' '.join(dark)} }}"


def _class(kind: str) -> str:
    return "kind-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in kind)


def _frame(frame: Frame, picture: Picture) -> str:
    out = INSET if frame.inner else OUTSET
    x, width, height = picture.left - out, picture.right - picture.left + 2 * out, frame.bottom - frame.top
    fill, name = (FILL, "fill") if not frame.inner else ("none", "")
    shape = (
        f'<rect class="{f"{name}-fill " if name else ""}rule-line" x="{x:.1f}" y="{frame.top:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" rx="{6 if frame.inner else 12}" fill="{fill}" stroke="{RULE}"/>'
    )
    if frame.inner:
        return shape + _text(
            picture.left, frame.top + CAPTION - 7, frame.caption, size=11, tone="muted", mono=True
        )
    return shape + _text(
        picture.left - INSET, frame.top + CAPTION - 5, frame.caption, size=12, weight=650, mono=True
    )


def _box(placed: PlacedBox, picture: Picture) -> str:
    width = picture.right - picture.left
    box, middle = placed.box, placed.top + placed.height / 2 + 4
    shape = shape_text(box.shape)
    room = int((width - 58 - SHAPE * len(shape)) / NAME)
    label = legible(box_text(box))
    if len(label) > room:
        label = "…" + label[len(label) - room + 1 :]
    ports = [_ports(placed, bus_side, picture) for bus_side in ("left", "right")]
    return (
        f'<g class="box" data-box="{picture.number_of(box.name)}">'
        f"<title>{escape(legible(box.name))}, {shape}</title>"
        f'<rect class="paper-fill rule-line" x="{picture.left:.1f}" y="{placed.top:.1f}" width="{width:.1f}" '
        f'height="{placed.height:.1f}" rx="5" fill="{PAPER}" stroke="{RULE}"/>'
        + _text(picture.left + 22, middle, label, size=12, mono=True)
        + _text(picture.right - 22, middle, shape, size=11, tone="muted", mono=True, anchor="end")
        + "".join(ports)
        + "</g>"
    )


def _ports(placed: PlacedBox, side: str, picture: Picture) -> str:
    """Return a tag with its number for each axis that a group on this side meets."""
    stops = sorted(
        (stop.end.axis, stop.y)
        for bus in picture.buses
        if bus.side == side
        for stop in bus.stops
        if stop.end.box == placed.box.name
    )
    tags = []
    for axis, met in groupby(stops, key=lambda stop: stop[0]):
        heights = [y for _, y in met]
        x = picture.left + 9 if side == "left" else picture.right - 9
        tags.append(
            _text(x, sum(heights) / len(heights) + 3.5, str(axis), size=9.5, tone="muted", anchor="middle")
        )
    return "".join(tags)


def _bus(bus: Bus, picture: Picture) -> str:
    bond, paint = bus.bond, _Paint(bus.bond)
    low, high = bus.span
    verdict = "prunable" if bond.prunable else f"not prunable: {bond.reason}"
    words = legible(f"{bond.name}: {bond.size:,} units, {verdict}")
    edge, sign = (MARGIN + CARD, -1) if bus.side == "left" else (picture.width - MARGIN - CARD, 1)
    numbers = sorted({str(picture.number_of(stop.end.box)) for stop in bus.stops})
    near, card = edge - 18 * sign, bus.card + LINE - 4
    line = 'stroke-width="1.2" stroke-dasharray="1 3"' if bond.bundle else f'stroke-width="4"{paint.dash}'
    return (
        f'<g class="group" data-group={quoteattr(legible(bond.name))} '
        f'data-boxes="{" ".join(numbers)}"><title>{escape(words)}</title>'
        f'<path {paint.line} stroke-opacity="0.75" d="M{bus.x:.1f} {bus.leader:.1f}H{near:.1f}'
        f'C{near + 10 * sign:.1f} {bus.leader:.1f} {edge - 10 * sign:.1f} {card:.1f} {edge:.1f} {card:.1f}"/>'
        f'<path {paint.line} {line} stroke-linecap="round" d="M{bus.x:.1f} {low:.1f}V{high:.1f}"/>'
        f"{''.join(_stop(stop, bus, picture, paint) for stop in bus.stops)}{_card(bus, edge, paint)}</g>"
    )


class _Paint:
    """How a group is drawn: in its kind's colour, dashed and hollow if it stays."""

    def __init__(self, bond: Bond) -> None:
        colour, name = look_of(bond.kind).light, _class(bond.kind)
        hollow = not bond.prunable
        self.line = f'class="{name}-line" stroke="{colour}" fill="none"'
        self.fill = f'class="{name}-fill" fill="{colour}"'
        self.dash = ' stroke-dasharray="5 4"' if hollow else ""
        inside = f'fill="{PAPER}"' if hollow else f'fill="{colour}"'
        self.dot = f'class="{"paper" if hollow else name}-fill {name}-line" {inside} stroke="{colour}"'


def _stop(stop: Stop, bus: Bus, picture: Picture, paint: _Paint) -> str:
    """Return the line from a bus to a box: an arrow into the box if it reads, out of it if it writes.

    A shared buffer, which stays whole while the group reads a part of it, hangs on a dotted line.
    """
    dash = ' stroke-dasharray="1.6 3.4"' if stop.end.side == "selected" else paint.dash
    box, sign = (picture.left, 1) if bus.side == "left" else (picture.right, -1)
    parts = [
        f'<path {paint.line} stroke-width="1.6"{dash} d="M{bus.x:.1f} {stop.y:.1f}H{box:.1f}"/>',
        f'<circle {paint.dot} cx="{bus.x:.1f}" cy="{stop.y:.1f}" r="4" stroke-width="1.6"/>',
    ]
    if stop.end.side in ("consumes", "produces"):
        tip, back = (
            (box - sign, box - 8 * sign) if stop.end.side == "consumes" else (box - 8 * sign, box - sign)
        )
        parts.append(
            f'<path {paint.fill} d="M{tip:.1f} {stop.y:.1f}L{back:.1f} {stop.y - 3.6:.1f}V{stop.y + 3.6:.1f}Z"/>'
        )
    return "".join(parts)


def _card(bus: Bus, edge: float, paint: _Paint) -> str:
    left = bus.side == "left"
    text, anchor = (edge - 12, "end") if left else (edge + 12, "start")
    head, *rest = bus.lines
    lines = [_text(text, bus.card + LINE, head, size=13, weight=650, anchor=anchor)]
    lines += [
        _text(text, bus.card + LINE * (row + 2), line, size=11.5, tone="muted", anchor=anchor)
        for row, line in enumerate(rest)
    ]
    return (
        f'<rect x="{edge - (CARD if left else 0):.1f}" y="{bus.card:.1f}" width="{CARD:.1f}" '
        f'height="{bus.card_height:.1f}" fill="none" pointer-events="all"/>'
        f'<path {paint.line} stroke-width="4"{paint.dash} '
        f'd="M{edge:.1f} {bus.card + 2:.1f}v{bus.card_height - 4:.1f}"/>' + "".join(lines)
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    weight: int = 400,
    tone: str = "ink",
    mono: bool = False,
    anchor: str = "start",
) -> str:
    font = _MONO if mono else _SANS
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return (
        f'<text class="{tone}-fill" x="{x:.1f}" y="{y:.1f}" font-family="{font}" font-size="{size}" '
        f'font-weight="{weight}" fill="{_FIXED[tone]}"{where}>{escape(legible(text))}</text>'
    )
