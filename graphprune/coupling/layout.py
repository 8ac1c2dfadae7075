"""Layouts: what an axis is made of, and the unification that couples two of them.

An axis of a tensor is an *atom* (an index set of known size), a row-major *product* of layouts
(576 = 9 heads × 64), or a *concatenation* of layouts (fused query, key and value). An operator demands that two
layouts be equal; `LayoutSolver.unify` refines both until their pieces match and merges the pieces by union-find.
Work is per axis and per atom, never per index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

Form = Literal["atom", "product", "concat"]


class Layout:
    """A node of the union-find forest; ask `LayoutSolver.find` for the one that stands for it.

    Attributes:
        identity: Number in order of creation.
        size: How many indices it spans.
        form: What it is made of.
        parts: The factors of a product, the segments of a concatenation.
        pins: Reasons why its units may be neither permuted nor removed.
        blocks: Reasons why its units may be permuted, but not removed.
        marks: What operators do with it, from which the kind of a group is inferred.
        anchored: Whether it is an axis of the model's inputs, so that no part of the graph may read a selection of it.
        minimum: How many of its units must stay.
    """

    __slots__ = (
        "anchored",
        "blocks",
        "form",
        "identity",
        "marks",
        "minimum",
        "parent",
        "parts",
        "pins",
        "size",
    )

    def __init__(self, identity: int, size: int, form: Form, parts: tuple[Layout, ...] = ()) -> None:
        self.identity = identity
        self.size = size
        self.form = form
        self.parts = parts
        self.parent: Layout | None = None
        self.pins: dict[str, None] = {}  # a dict keeps the order in which reasons came up
        self.blocks: dict[str, None] = {}
        self.marks: dict[str, None] = {}
        self.anchored = False
        self.minimum = 1


def find(layout: Layout) -> Layout:
    """Return the layout that stands for `layout` after all unifications so far."""
    while layout.parent is not None:
        if layout.parent.parent is not None:
            layout.parent = layout.parent.parent
        layout = layout.parent
    return layout


def atoms_of(layout: Layout) -> Iterator[Layout]:
    """Yield the atoms that `layout` is made of, in order, each as often as it occurs."""
    layout = find(layout)
    if layout.form == "atom":
        yield layout
    else:
        for part in layout.parts:
            yield from atoms_of(part)


@dataclass(frozen=True, slots=True)
class Coupling:
    """One demand that two layouts be equal, or one being a part of the other, by the operator that made it."""

    first: int
    second: int
    operator: str
    relation: Literal["equal", "part"] = "equal"


class LayoutSolver:
    """Creates layouts, unifies them, and remembers which operator coupled what.

    Attributes:
        layouts: All that were made; a layout's identity is its place in this list.
        couplings: Which operator demanded that which layouts be equal, or composed which of which.
        operator: The operator that is being read.
    """

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        self.couplings: list[Coupling] = []
        self.operator = ""

    def atom(self, size: int) -> Layout:
        """Return a new index set of `size`."""
        return self._new(size, "atom")

    def product(self, factors: Sequence[Layout]) -> Layout:
        """Return the row-major product of `factors`; factors of size 1 vanish."""
        kept = [factor for factor in factors if factor.size != 1]
        if not kept:
            return self.atom(1)
        if len(kept) == 1:
            return kept[0]
        return self._new(math.prod(factor.size for factor in kept), "product", tuple(kept))

    def concat(self, segments: Sequence[Layout]) -> Layout:
        """Return the concatenation of `segments`; empty ones vanish."""
        kept = [segment for segment in segments if segment.size != 0]
        if len(kept) == 1:
            return kept[0]
        return self._new(sum(segment.size for segment in kept), "concat", tuple(kept))

    def pin(self, layout: Layout, reason: str) -> None:
        """Forbid to permute or remove units of `layout`."""
        find(layout).pins.setdefault(reason)

    def block(self, layout: Layout, reason: str) -> None:
        """Forbid to remove units of `layout`; they may still be permuted."""
        find(layout).blocks.setdefault(reason)

    def mark(self, layout: Layout, mark: str) -> None:
        """Note what an operator does with `layout`."""
        find(layout).marks.setdefault(mark)

    def anchor(self, layout: Layout) -> None:
        """Note that `layout` is one of the model's inputs' own, or made of them in an unknown way."""
        for atom in atoms_of(layout):
            atom.anchored = True

    def is_free(self, layout: Layout) -> bool:
        """Whether some part of `layout` is not anchored."""
        return any(atom.size > 1 and not atom.anchored for atom in atoms_of(layout))

    def copy(self, layout: Layout, made: dict[int, Layout]) -> Layout:
        """Return a layout of the same form, of atoms that are coupled with nothing; anchored ones stay themselves.

        Args:
            layout: What to copy.
            made: Copies so far by the identity of their source; the new ones are added.
        """
        layout = find(layout)
        if not self.is_free(layout):
            return layout
        if layout.identity not in made:
            parts = tuple(self.copy(part, made) for part in layout.parts)
            made[layout.identity] = self._new(layout.size, layout.form, parts)
        return made[layout.identity]

    def unify(self, first: Layout, second: Layout, operator: str) -> None:
        """Demand that two layouts be equal.

        Layouts that cannot be made equal (sizes differ, or no common refinement exists) are pinned: sound,
        never a guess.

        Args:
            first: One layout.
            second: The other.
            operator: Who demands it; `operator` becomes the edge of the coupling graph.
        """
        a, b = find(first), find(second)
        if a is b:
            return
        if a.size != b.size:
            self._conflict((a, b), operator)
            return
        self.couplings.append(Coupling(a.identity, b.identity, operator))
        if a.form == "atom":
            self._merge(a, b)
        elif b.form == "atom":
            self._merge(b, a)
        elif a.form == b.form == "product":
            mine, theirs = self.factors(a), self.factors(b)
            self._merge(a, b)
            self._align(mine, theirs, partial(self._cut_factor, operator), operator)
        elif a.form == b.form == "concat":
            mine, theirs = self.segments(a), self.segments(b)
            self._merge(a, b)
            self._align(mine, theirs, partial(self._cut_segment, operator), operator)
        elif a.form == "concat":
            self._distribute(a, b, operator)
        else:
            self._distribute(b, a, operator)

    def factors(self, layout: Layout) -> list[Layout]:
        """Return the factors of a product, outermost first, with nested products opened."""
        layout = find(layout)
        if layout.form != "product":
            return [layout]
        return [factor for part in layout.parts for factor in self.factors(part)]

    def segments(self, layout: Layout) -> list[Layout]:
        """Return the segments of a concatenation, with nested ones opened.

        A product whose outermost factor is a concatenation is one too: (a + b) × d = a × d + b × d.
        """
        layout = find(layout)
        if layout.form == "concat":
            return [segment for part in layout.parts for segment in self.segments(part)]
        if layout.form == "product":
            first, *rest = self.factors(layout)
            outer = self.segments(first)
            if len(outer) > 1:
                return [self.product([segment, *rest]) for segment in outer]
        return [layout]

    def atoms(self, layout: Layout) -> Iterator[Layout]:
        """Yield the atoms that `layout` is made of, in order, each as often as it occurs."""
        yield from atoms_of(layout)

    def settle(self) -> None:
        """Hand the pins, blocks and marks of composed layouts down to their atoms.

        An axis in which an atom is a factor twice (a matrix coupled with its own transpose) has no units of its own.
        """
        for layout in self.layouts:
            if layout.parent is None and layout.parts:
                if layout.form == "product":
                    self._pin_repeated_factors(layout)
                if layout.pins or layout.blocks or layout.marks:
                    for atom in atoms_of(layout):
                        self._inherit(atom, layout)

    def _pin_repeated_factors(self, product: Layout) -> None:
        seen: set[int] = set()
        for part in product.parts:
            atoms = {atom.identity: atom for atom in atoms_of(part)}
            for identity in seen & atoms.keys():
                self.pin(atoms[identity], "one axis holds it twice, as rows and columns of a matrix")
            seen |= atoms.keys()

    def _new(self, size: int, form: Form, parts: tuple[Layout, ...] = ()) -> Layout:
        layout = Layout(len(self.layouts), size, form, parts)
        self.layouts.append(layout)
        self.couplings += [
            Coupling(layout.identity, part.identity, self.operator, "part") for part in parts if part.size > 1
        ]
        return layout

    def _merge(self, layout: Layout, into: Layout) -> None:
        layout.parent = into
        self._inherit(into, layout)
        if layout.anchored:
            self.anchor(into)

    @staticmethod
    def _inherit(heir: Layout, source: Layout) -> None:
        if heir is not source:
            heir.pins.update(source.pins)
            heir.blocks.update(source.blocks)
            heir.marks.update(source.marks)
            heir.minimum = max(heir.minimum, source.minimum)

    def _conflict(self, layouts: Iterable[Layout], operator: str) -> None:
        for layout in layouts:
            for atom in atoms_of(layout):
                self.pin(atom, f"{operator} couples sizes that have no common refinement")

    def _align(
        self,
        first: list[Layout],
        second: list[Layout],
        cut: Callable[[Layout, int], list[Layout]],
        operator: str,
    ) -> None:
        """Match two decompositions of one size, piece by piece from the last.

        Args:
            first: Pieces of one layout; used up.
            second: Pieces of the other; used up.
            cut: Takes a given size off the end of a piece, and returns the pieces that it now has.
            operator: Who demands it.
        """
        while first and second:
            large, small = find(first.pop()), find(second.pop())
            if large.size < small.size:
                large, small, first, second = small, large, second, first
            if large.size == small.size:
                self.unify(large, small, operator)
                continue
            pieces = cut(large, small.size)
            if len(pieces) < 2:
                self._conflict((large, small, *first, *second), operator)
                return
            first.extend(pieces)
            second.append(small)

    def _cut_factor(self, operator: str, layout: Layout, size: int) -> list[Layout]:
        if layout.size % size == 0:
            self.unify(self.product([self.atom(layout.size // size), self.atom(size)]), layout, operator)
        return self.factors(layout)

    def _cut_segment(self, operator: str, layout: Layout, size: int) -> list[Layout]:
        self.unify(self.concat([self.atom(layout.size - size), self.atom(size)]), layout, operator)
        return self.segments(layout)

    def _distribute(self, concat: Layout, product: Layout, operator: str) -> None:
        """Couple a concatenation with a product: its outermost factor is cut where the segments end."""
        outer, *rest = self.factors(product)
        inner = math.prod(factor.size for factor in rest)
        segments = self.segments(concat)
        if any(segment.size % inner for segment in segments):
            self._conflict((concat, product), operator)
            return
        pieces = [self.atom(segment.size // inner) for segment in segments]
        self._merge(concat, product)
        self.unify(outer, self.concat(pieces), operator)
        for piece, segment in zip(pieces, segments, strict=True):
            self.unify(segment, self.product([piece, *rest]), operator)
