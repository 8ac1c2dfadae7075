"""Rows, which are single indices of single axes, and clauses between them; see `brute_force`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Axis = tuple[str, int]
Slice = tuple[str, int, int]


class Rows:
    """All rows of a program's tensors, numbered, and what is demanded of them.

    Attributes:
        shapes: Of all tensors.
        parameters: Their qualified names, by the names that they have as tensors.
        free: Tensors that no parameter has a part in.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parameters: dict[str, str] = {}
        self.free: set[str] = set()
        self._first: dict[Axis, int] = {}
        self._axes: list[Axis] = []
        self._clauses: list[tuple[Numbers, Numbers]] = []
        self._kept: list[int] = []
        self._copies: list[tuple[str, str]] = []

    def add(self, name: str, shape: Sequence[int]) -> str:
        """Number the rows of a tensor; an axis of one row never loses it."""
        self.shapes[name] = tuple(shape)
        for axis, size in enumerate(shape):
            self._first[name, axis] = len(self._axes)
            self._axes.extend([(name, axis)] * size)
            if size == 1:
                self.keep(name, axis)
        return name

    def copy(self, name: str, reader: str) -> str:
        """Number the rows of a reader's own copy of a free tensor: only what no input lets go is kept in it too."""
        copied = self.add(f"{name}@{reader}", self.shapes[name])
        self._copies.append((name, copied))
        return copied

    def keep(self, name: str, *axes: int) -> None:
        """State that no row of these axes goes; of no axis, if none is named."""
        for axis in axes or range(len(self.shapes[name])):
            self._kept.extend(self._rows(name, axis).tolist())

    def same(self, first: str, axis: int, second: str, other: int) -> None:
        """State that two axes lose the same indices."""
        one, two = self._rows(first, axis), self._rows(second, other)
        self._demand(one, two[:, None])
        self._demand(two, one[:, None])

    def moved(self, source: str, result: str, elements: Numbers) -> None:
        """State what follows from where elements go.

        Args:
            source: A tensor.
            result: Another.
            elements: For each element of `result`, which element of `source` it is, or -1 for none.
        """
        places = np.nonzero(elements >= 0)
        numbers = elements[places]
        if not len(numbers):
            return
        origins = np.unravel_index(numbers, self.shapes[source])
        here = np.stack([self._rows(source, axis)[at] for axis, at in enumerate(origins)], axis=1)
        there = np.stack([self._rows(result, axis)[at] for axis, at in enumerate(places)], axis=1)
        for column in here.T:
            self._cover(column, there, there)
        single = np.unique(numbers, return_index=True)[1]
        for column in there.T:  # an element goes only with the last of its copies
            lowest = np.full(math.prod(self.shapes[source]), len(self._axes))
            highest = np.full(math.prod(self.shapes[source]), -1)
            np.minimum.at(lowest, numbers, column)
            np.maximum.at(highest, numbers, column)
            last = single[(lowest == highest)[numbers[single]]]
            self._cover(column[last], here[last], here[single])

    def settle(self) -> None:
        """Find all rows that cannot go: what is kept, and what would need one of these to go."""
        self._stays = np.zeros(len(self._axes), dtype=bool)
        self._stays[self._kept] = True
        before = -1
        while before != (before := int(self._stays.sum())):
            for name, copied in self._copies:
                for axis in range(len(self.shapes[name])):
                    self._stays[self._rows(copied, axis)] |= self._stays[self._rows(name, axis)]
            for left, right in (*self._clauses, *reversed(self._clauses)):
                self._stays[left[(self._stays[right] | (right < 0)).all(axis=1)]] = True

    def is_kept(self, name: str) -> bool:
        """Return whether an input, or what is computed of one in a way unknown, is said to keep all its rows."""
        return set(self._rows(name, 0).tolist()) <= set(self._kept)

    def clauses(self) -> dict[int, list[frozenset[int]]]:
        """Return, for each row that can go, the sets of rows of which one must go with it."""
        found: dict[int, set[frozenset[int]]] = defaultdict(set)
        for left, right in self._clauses:
            goes = ~self._stays[left]
            for row, options in zip(left[goes].tolist(), right[goes].tolist(), strict=True):
                found[row].add(
                    frozenset(option for option in options if option >= 0 and not self._stays[option])
                )
        return {row: sorted(options, key=len) for row, options in found.items()}

    def seeds(self) -> Iterator[int]:
        """Yield the rows of parameters that can go."""
        for name in self.parameters:
            for axis in range(len(self.shapes[name])):
                yield from (row for row in self._rows(name, axis).tolist() if not self._stays[row])

    def empties_an_axis(self, rows: Iterable[int]) -> bool:
        """Return whether `rows` are all rows of some axis."""
        counts = Counter(self._axes[row] for row in rows)
        return any(count == self.shapes[name][axis] for (name, axis), count in counts.items())

    def signature(self, rows: Iterable[int]) -> frozenset[tuple[Axis, int]]:
        """Return how many of `rows` each axis has."""
        return frozenset(Counter(self._axes[row] for row in rows).items())

    def by_axis(self, rows: Iterable[int]) -> dict[Axis, list[int]]:
        """Return the indices of `rows` by axis, ascending."""
        found: dict[Axis, list[int]] = defaultdict(list)
        for row in sorted(rows):
            found[self._axes[row]].append(row - self._first[self._axes[row]])
        return found

    def slices(self, rows: Iterable[int]) -> frozenset[Slice]:
        """Return the rows of parameters by the parameters' qualified names."""
        return frozenset(
            (self.parameters[name], axis, index)
            for (name, axis), indices in self.by_axis(rows).items()
            if name in self.parameters
            for index in indices
        )

    def of(self, slices: Iterable[Slice]) -> list[int]:
        """Return the rows of slices of parameters."""
        names = {parameter: name for name, parameter in self.parameters.items()}
        return [int(self._rows(names[parameter], axis)[index]) for parameter, axis, index in slices]

    def _rows(self, name: str, axis: int) -> Numbers:
        axis %= len(self.shapes[name])
        return np.arange(self.shapes[name][axis]) + self._first[name, axis]

    def _cover(self, left: Numbers, right: Numbers, everything: Numbers) -> None:
        """State that elements of a row that goes lie in rows that go at the other end.

        Args:
            left: For each element that is moved, its row in one axis at this end.
            right: Its rows at the other end, one for each axis.
            everything: The same as `right`, of all elements.

        Where all elements of a line along some axis go, they cannot be left to the rows of that axis: all of them
        would go. Another row that covers one of them covers the line.
        """
        options = right.copy()
        for axis in range(right.shape[1]):
            mine, whole = (self._code(np.delete(rows, axis, axis=1)) for rows in (right, everything))
            lines, lengths = np.unique(whole, return_counts=True)
            _, place, counts = np.unique(
                self._code(np.stack([left, np.searchsorted(lines, mine)], axis=1)),
                return_inverse=True,
                return_counts=True,
            )
            options[counts[place] == lengths[np.searchsorted(lines, mine)], axis] = -1
        self._demand(left, options)

    def _code(self, table: Numbers) -> Numbers:
        """Return one number for each line of a table of up to five rows."""
        return table @ (len(self._axes) + 1) ** np.arange(table.shape[1])

    def _demand(self, left: Numbers, right: Numbers) -> None:
        """State that if `left[i]` goes, one of `right[i]` goes; -1 is none."""
        if not len(left):
            return
        table = np.unique(np.concatenate([left[:, None], right], axis=1), axis=0)
        self._clauses.append((table[:, 0], table[:, 1:]))
