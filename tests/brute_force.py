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

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from brute_force_operators import rows_of
from brute_force_rows import Rows, Slice
from brute_force_run import Runner
from torch import Tensor
from torch.export import ExportedProgram

Removal = frozenset[int]
MOST_BRANCHES = 1_000


class TooManyBranchesError(Exception):
    """The network is too large for this search."""


@dataclass(frozen=True)
class Unit:
    """The parameters' slices of a minimal removal, and whether it is removable."""

    slices: frozenset[Slice]
    removable: bool


def units_of(
    program: ExportedProgram, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> set[Unit]:
    """Return all units of an exported program, by running it on `weights` and `inputs` in float64."""
    rows = rows_of(program, weights)
    return Search(rows).units(Runner(program, rows, weights, inputs))


class Search:
    """Follows the clauses from every index of every parameter."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._clauses = rows.clauses()

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
        return _smallest(removal for seed in self._rows.seeds() for removal in self._follow([seed]))

    def smallest(self, slices: Iterable[Slice]) -> list[frozenset[Slice]]:
        """Return the smallest removals that contain given slices of parameters, as slices of parameters."""
        return [self._rows.slices(removal) for removal in _smallest(self._follow(self._rows.of(slices)))]

    def _alike(self) -> list[list[Removal]]:
        """Return the minimal removals by how many rows of which axes they take."""
        alike: dict[object, list[Removal]] = defaultdict(list)
        for removal in sorted(self.removals, key=sorted):
            alike[self._rows.signature(removal)].append(removal)
        return list(alike.values())

    def _follow(self, seeds: Iterable[int]) -> list[Removal]:
        """Return removals that contain `seeds`, all minimal ones among them."""
        found: list[Removal] = []
        branches = [(set(seeds), list(seeds), [])]
        for _ in range(MOST_BRANCHES):
            if not branches:
                return found
            removed, choices = self._fulfil(*branches.pop())
            if self._rows.empties_an_axis(removed) or any(other <= removed for other in found):
                continue
            if not choices:
                found.append(frozenset(removed))
                continue
            wanted = Counter(option for options in choices for option in options)
            # What most clauses want is tried first, and cuts the rest short.
            for option in sorted(min(choices, key=len), key=wanted.__getitem__):
                branches += [({*removed, option}, [option], choices)]
        raise TooManyBranchesError

    def _fulfil(
        self, removed: set[int], fresh: list[int], choices: list[Removal]
    ) -> tuple[set[int], list[Removal]]:
        """Follow the clauses of `fresh` rows that leave no choice; return what goes, and the choices that are left."""
        choices = list(choices)
        while fresh:
            for options in self._clauses.get(fresh.pop(), ()):
                if not options & removed:
                    if len(options) == 1:
                        removed |= options
                        fresh.extend(options)
                    else:
                        choices.append(options)
        return removed, [options for options in choices if not options & removed]


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
