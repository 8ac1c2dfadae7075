"""A brute-force search for removable units, which knows nothing of layouts; slow, for networks of some 64 units.

Every index of every axis of every tensor is one *row*: (tensor, axis, index). Each operator of the exported program
states, for its own tensors and sizes, clauses of one form: *if this row goes, one of those rows must go*. For an
operator that only moves data, the clauses are read off its result on numbered elements: an element that is gone
from a view's source must lie in a row that is gone from the view, and the other way round. What is left of each
tensor is therefore always a full grid, and shapes fit.

A **removal** is a set of rows that contains an index of a parameter, fulfils all clauses, touches neither inputs nor
outputs, and takes no axis away whole. A removal is **minimal** if no other is contained in it; minimal ones are
found by following all clauses from each index of each parameter and branching where a clause leaves a choice. A view
of 12 rows as (key heads 2) × (repeat 2) × (width 3) leaves three: the element that is gone takes along its key head,
its place among the query heads of all key heads, or its place in the width of all heads. Each is a minimal removal,
and they overlap; they belong to three groups that form a grid.

A minimal removal is a **unit** if there is another one just like it, disjoint from it, with which it can trade
places in the whole network without moving the output. It is **removable** if the network without its rows computes
what the network computes with its parameters' rows set to zero. Both are found by running (`brute_force_run`), so
that nothing has to be known of norms or softmax. Values that no parameter has a part in (rotary tables, masks) can
be read at any indices: each operator that mixes them with others reads its own copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from brute_force_operators import rows_of
from brute_force_rows import Rows, Slice
from brute_force_run import Runner
from torch import Tensor
from torch.export import ExportedProgram

Removal = frozenset[int]
MOST_BRANCHES = 20_000


class TooManyBranchesError(Exception):
    """The network is too large for this search."""


@dataclass(frozen=True)
class Unit:
    """The parameters' slices of a minimal removal, and whether it is removable."""

    slices: frozenset[Slice]
    removable: bool


def units_of(program: ExportedProgram, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> set[Unit]:
    """Return all units of an exported program, by running it on `weights` and `inputs` in float64."""
    rows = rows_of(program, weights)
    return Search(rows).units(Runner(program, rows, weights, inputs))


class Search:
    """Follows the clauses from every index of every parameter."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._clauses = rows.clauses()
        self._branches = 0

    def units(self, runner: Runner) -> set[Unit]:
        """Return all units; of those that are alike, the first and the last are run."""
        found: set[Unit] = set()
        for alike in self._alike():
            pairs = [(one, other) for one in alike if (other := _disjoint(one, alike))]
            tried = pairs[:1] + pairs[1:][-1:]
            if all(runner.trades(one, other) for one, other in tried):
                removable = all(runner.removes(one) for one, _ in tried)
                found |= {Unit(self._rows.slices(one), removable) for one, _ in pairs}
        return found

    @cached_property
    def removals(self) -> set[Removal]:
        """All minimal removals."""
        return _smallest(removal for seed in self._rows.seeds() for removal in self._follow({seed}, [seed], []))

    def smallest(self, slices: Iterable[Slice]) -> list[frozenset[Slice]]:
        """Return the smallest removals that contain given slices of parameters, as slices of parameters."""
        seeds = self._rows.of(slices)
        return [self._rows.slices(removal) for removal in _smallest(self._follow(set(seeds), seeds, []))]

    def _alike(self) -> list[list[Removal]]:
        """Return the minimal removals by how many rows of which axes they take."""
        alike: dict[object, list[Removal]] = defaultdict(list)
        for removal in sorted(self.removals, key=sorted):
            alike[self._rows.signature(removal)].append(removal)
        return list(alike.values())

    def _follow(self, removed: set[int], fresh: list[int], choices: list[Removal]) -> Iterator[Removal]:
        """Fulfil all clauses of `fresh` rows, and branch over the first that leaves a choice."""
        self._branches += 1
        if self._branches > MOST_BRANCHES:
            raise TooManyBranchesError
        while fresh:
            for options in self._clauses.get(fresh.pop(), ()):
                if options & removed:
                    continue
                if len(options) == 1:
                    removed |= options
                    fresh.extend(options)
                else:
                    choices.append(options)
        if self._rows.empties_an_axis(removed):
            return
        choices = [options for options in choices if not options & removed]
        if not choices:
            yield frozenset(removed)
            return
        for option in choices[0]:
            yield from self._follow({*removed, option}, [option], list(choices[1:]))


def _smallest(removals: Iterable[Removal]) -> set[Removal]:
    """Return the removals that contain no other."""
    found = set(removals)
    by_row: dict[int, list[Removal]] = defaultdict(list)
    for removal in found:
        for row in removal:
            by_row[row].append(removal)
    return {one for one in found if not any(other < one for row in one for other in by_row[row])}


def _disjoint(one: Removal, alike: list[Removal]) -> Removal | None:
    return next((other for other in alike if not one & other), None)
