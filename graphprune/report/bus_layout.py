"""Where things stand in the picture of a block: boxes below each other, groups as buses left and right of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from graphprune.report.block import Block, Bond, Box, End
from graphprune.report.kinds import title_of

# Pixels at the picture's own size.
MARGIN, TOP, BOX, GAP, PORT, LINE = 24.0, 84.0, 28.0, 9.0, 11.0, 16.0
FRAME, CAPTION, PART_GAP, INSET, OUTSET = 10.0, 22.0, 26.0, 10.0, 22.0
STUB, LANE, LEADER, CARD = 48.0, 18.0, 26.0, 232.0
NAME, SHAPE, LEAST_BOX, MOST_BOX = 7.4, 6.7, 290.0, 520.0
CARD_GAP, REASON = 18.0, 38

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")


@dataclass(frozen=True, slots=True)
class PlacedBox:
    """A box with its top edge and height."""

    box: Box
    top: float
    height: float


@dataclass(frozen=True, slots=True)
class Frame:
    """A rectangle around the boxes of the block or, if `inner`, of a module in it."""

    caption: str
    inner: bool
    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a bus meets a box."""

    end: End
    y: float


@dataclass(frozen=True, slots=True)
class Bus:
    """A group as a vertical line at `x`, met at its stops; a leader at the height `leader` ends at its card."""

    bond: Bond
    side: Side
    x: float
    stops: tuple[Stop, ...]
    leader: float
    lines: tuple[str, ...]
    card: float = 0.0

    @property
    def span(self) -> tuple[float, float]:
        """The heights at which the line begins and ends."""
        heights = [*(stop.y for stop in self.stops), self.leader]
        return min(heights), max(heights)

    @property
    def card_height(self) -> float:
        """Of the text on the card."""
        return LINE * len(self.lines) + 8


@dataclass(frozen=True, slots=True)
class Picture:
    """The whole layout; `left` and `right` are the edges of the boxes."""

    width: float
    height: float
    left: float
    right: float
    boxes: tuple[PlacedBox, ...]
    frames: tuple[Frame, ...]
    buses: tuple[Bus, ...]

    def number_of(self, box: str) -> int:
        """Return the place of a box from the top."""
        return next(number for number, placed in enumerate(self.boxes) if placed.box.name == box)


def lay_out(block: Block) -> Picture:
    """Return the layout of a block's picture."""
    sides = _sides(block)
    boxes, frames, bottom = _stack(block, _ports_needed(block, sides))
    ports = _ports(boxes, block.bonds, sides)
    gaps = [placed.top + placed.height + GAP / 2 for placed in boxes]
    leaders = _leaders(block.bonds, sides, ports, gaps)
    lanes = {
        side: _lanes([b for b in block.bonds if sides[b.name] == side], ports, leaders) for side in SIDES
    }
    room = {side: _room(lanes[side]) for side in SIDES}
    left = MARGIN + room["left"]
    right = left + _box_width(block.boxes)
    buses = [
        Bus(
            bond=bond,
            side=side,
            x=left - STUB - LANE * lane if side == "left" else right + STUB + LANE * lane,
            stops=tuple(Stop(end, ports[bond.name, end]) for end in bond.ends),
            leader=leaders[bond.name],
            lines=card_lines(bond),
        )
        for side in SIDES
        for bond, lane in lanes[side]
    ]
    placed = [bus for side in SIDES for bus in _with_cards([b for b in buses if b.side == side], bottom)]
    deepest = max((bus.card + bus.card_height for bus in placed), default=0.0)
    return Picture(
        width=right + room["right"] + MARGIN,
        height=max(bottom, deepest) + 46,
        left=left,
        right=right,
        boxes=tuple(boxes),
        frames=tuple(frames),
        buses=tuple(placed),
    )


def card_lines(bond: Bond) -> tuple[str, ...]:
    """Return what is written about a group: kind, units, what a unit frees, and why it stays."""
    many = f" × {bond.copies:,}" if bond.copies > 1 else ""
    lines = [title_of(bond.kind) + many]
    if not bond.bundle:
        lines.append(f"{bond.size:,} units of {bond.parameters_per_unit:,} parameters")
    if bond.elsewhere:
        lines.append(f"and {bond.elsewhere:,} members elsewhere")
    if not bond.prunable:
        reason = f"stays: {bond.reason or 'no reason given'}"
        lines += wrapped(reason, REASON)
    return tuple(lines)


def wrapped(text: str, width: int) -> list[str]:
    """Return text in lines of at most `width` characters; long names are broken behind a dot or an underscore."""
    lines = [""]
    for word in re.findall(rf"[^\s._/]{{1,{width - 1}}}[\s._/]?|[\s._/]", text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.strip() for line in lines]


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as it is written in a box."""
    return " × ".join(f"{size:,}" for size in shape)


def box_text(box: Box) -> str:
    """Return a box's label, with how many alike parameters it stands for."""
    return f"{box.label} × {box.copies}" if box.copies > 1 else box.label


def _sides(block: Block) -> dict[str, Side]:
    """Return left for the groups that run through the model, right for the others."""
    through = {bond.name for bond in block.bonds if not bond.local}
    if not through and len(block.bonds) > 1:
        through = {max(block.bonds, key=lambda bond: len(bond.ends)).name}
    return {bond.name: "left" if bond.name in through else "right" for bond in block.bonds}


def _ports_needed(block: Block, sides: Mapping[str, Side]) -> dict[str, int]:
    """Return for each box the ends on its busier side."""
    return {
        box.name: max(
            sum(end.box == box.name for bond in block.bonds if sides[bond.name] == side for end in bond.ends)
            for side in SIDES
        )
        for box in block.boxes
    }


def _stack(block: Block, ports: Mapping[str, int]) -> tuple[list[PlacedBox], list[Frame], float]:
    boxes: list[PlacedBox] = []
    frames: list[Frame] = []
    y = TOP
    for part, in_part in groupby(block.boxes, key=lambda box: box.part):
        framed, outer = part == "block" and bool(block.path), y
        y += CAPTION + 4 if framed else 0
        for module, in_module in groupby(in_part, key=lambda box: box.module):
            inner = y
            y += CAPTION if module else 0
            for box in in_module:
                height = max(BOX, 6 + PORT * ports[box.name])
                boxes.append(PlacedBox(box, y, height))
                y += height + GAP
            if module:
                y += FRAME - GAP
                frames.append(Frame(module, True, inner, y))
                y += GAP
        if framed:
            y += FRAME - GAP
            frames.append(Frame(_caption(block), False, outer, y))
            y += GAP
        y += PART_GAP
    return boxes, frames, y - PART_GAP


def _caption(block: Block) -> str:
    if len(block.alike) < 2:
        return block.path
    return f"{block.path.rpartition('.')[0]}.*  × {len(block.alike)}"


def _ports(
    boxes: Sequence[PlacedBox], bonds: Sequence[Bond], sides: Mapping[str, Side]
) -> dict[tuple[str, End], float]:
    """Return the height of each end by group: those of one box and side evenly apart, in the order of axes."""
    found = {}
    for placed in boxes:
        for side in SIDES:
            ends = [
                (bond.name, end)
                for bond in bonds
                if sides[bond.name] == side
                for end in bond.ends
                if end.box == placed.box.name
            ]
            ends.sort(key=lambda item: item[1].axis)
            for position, key in enumerate(ends):
                middle = placed.top + placed.height / 2
                found[key] = middle + PORT * (position - (len(ends) - 1) / 2)
    return found


def _leaders(
    bonds: Sequence[Bond],
    sides: Mapping[str, Side],
    ports: Mapping[tuple[str, End], float],
    gaps: Sequence[float],
) -> dict[str, float]:
    """Return for each group a height between two boxes, where no other line of its side runs, near its middle."""
    leaders: dict[str, float] = {}
    heights = {bond.name: sorted(ports[bond.name, end] for end in bond.ends) for bond in bonds}
    for bond in sorted(bonds, key=lambda bond: heights[bond.name][-1] - heights[bond.name][0]):
        low, high = heights[bond.name][0], heights[bond.name][-1]
        taken = {y for name, y in leaders.items() if sides[name] == sides[bond.name]}
        free = [gap + shift for shift in (0, -3, 3) for gap in gaps if gap + shift not in taken]
        within = [y for y in free if low < y < high] or [min(free, key=lambda y: (abs(y - high), y))]
        leaders[bond.name] = min(within, key=lambda y: abs(y - (low + high) / 2))
    return leaders


def _lanes(
    bonds: Sequence[Bond], ports: Mapping[tuple[str, End], float], leaders: Mapping[str, float]
) -> list[tuple[Bond, int]]:
    """Return a lane for each group: short ones near the boxes, and none upon another."""
    spans = {}
    for bond in bonds:
        heights = [ports[bond.name, end] for end in bond.ends]
        heights.append(leaders[bond.name])
        spans[bond.name] = (min(heights), max(heights))
    taken: list[list[tuple[float, float]]] = []
    placed = []
    for bond in sorted(bonds, key=lambda bond: spans[bond.name][1] - spans[bond.name][0]):
        low, high = spans[bond.name]
        free = (i for i, lane in enumerate(taken) if all(high + 4 < a or b + 4 < low for a, b in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        placed.append((bond, lane))
    return placed


def _room(lanes: Sequence[tuple[Bond, int]]) -> float:
    if not lanes:
        return OUTSET
    return STUB + LANE * max(lane for _, lane in lanes) + LEADER + CARD


def _box_width(boxes: Sequence[Box]) -> float:
    texts = (NAME * len(box_text(box)) + SHAPE * len(shape_text(box.shape)) for box in boxes)
    return min(MOST_BOX, max(LEAST_BOX, max(texts, default=0.0) + 74))


def _with_cards(buses: Sequence[Bus], bottom: float) -> list[Bus]:
    """Return the buses of one side with their cards near their leaders, none upon another."""
    ordered = sorted(buses, key=lambda bus: bus.leader)
    cards: list[float] = []
    least = TOP - 6
    for bus in ordered:
        cards.append(max(least, bus.leader - LINE))
        least = cards[-1] + bus.card_height + CARD_GAP
    most = max(bottom, least - CARD_GAP)
    for i in reversed(range(len(ordered))):
        cards[i] = min(cards[i], most - ordered[i].card_height)
        most = cards[i] - CARD_GAP
    return [replace(bus, card=card) for bus, card in zip(ordered, cards, strict=True)]
