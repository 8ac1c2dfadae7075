"""Sharing a budget out: how many units each item loses, so that the least is lost at the cost asked for.

A knapsack by dynamic programming over the cost that is removed. It needs costs that add up. Items that share a term of
the cost (the heads of a layer and the width of a head) are chosen together; an item that shares terms with very many
(the hidden size) is tried at each of its choices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from graphprune.errors import BudgetError
from graphprune.prune.polynomial import CostFunction

Numbers = NDArray[np.float64]

MOST_STATES = 4096
"""Different removed costs that are followed; more are put together, the one that loses least standing for its like."""
_MOST_TOGETHER = 4096
_MOST_TRIED = 4096


@dataclass(frozen=True, slots=True)
class Item:
    """Something that may lose units: a group, or groups that lose the same number.

    Attributes:
        name: The variable that stands for its kept units in the cost.
        size: Units before.
        choices: How many units it may lose, ascending from 0.
        lost: What each choice loses, in any unit that all items share.
    """

    name: str
    size: int
    choices: tuple[int, ...]
    lost: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice for every item.

    Attributes:
        removed: Units lost, by item.
        cost: What remains.
        lost: What is lost.
    """

    removed: Mapping[str, int]
    cost: float
    lost: float


def smallest_step(items: Sequence[Item], cost: CostFunction) -> float:
    """Return the least that removing units from one item alone takes off the cost; infinity if nothing does."""
    full = {item.name: item.size for item in items}
    before = cost(full)
    steps = (
        before - cost({**full, item.name: item.size - count}) for item in items for count in item.choices[1:]
    )
    return min((step for step in steps if step > 0), default=math.inf)


def allocate(items: Sequence[Item], cost: CostFunction, *, goal: float, tolerance: float) -> Allocation:
    """Return the allocation that loses least among those whose cost is the goal within a tolerance.

    If there is none, that whose cost is nearest. Nothing removed is no allocation. Exact as long as no more than
    `MOST_STATES` different costs have to be followed.

    Args:
        items: What may lose units.
        cost: In kept units, by the items' names.
        goal: The cost that should remain.
        tolerance: How far from the goal is near enough.

    Raises:
        BudgetError: If too many items share terms of the cost with too many others.
    """
    before = cost({item.name: item.size for item in items})
    shared, blocks = _blocks(items, cost)
    best: tuple[tuple[float, ...], Allocation] | None = None
    for tried in _tried(shared):
        rest = cost.fixed({item.name: item.size - item.choices[0] for item in tried})
        states = _States.at(rest.base, sum(item.lost[0] for item in tried))
        for place, block in enumerate(blocks, start=1):
            # The last block's states are all looked at: among so many, one comes near any goal.
            states = states.extended(_options(block, rest), MOST_STATES if place < len(blocks) else None)
        found = states.nearest(goal, tolerance, below=before)
        if found is not None and (best is None or found[0] < best[0]):
            removed = {item.name: item.choices[0] for item in tried}
            best = found[0], replace(found[1], removed={**removed, **found[1].removed})
    if best is None:
        raise BudgetError("no item can lose a unit", "allow smaller widths")
    return best[1]


def _blocks(items: Sequence[Item], cost: CostFunction) -> tuple[list[Item], list[list[Item]]]:
    """Part items into those to be tried one by one, and blocks whose costs then add up."""
    of_name = {item.name: item for item in items}
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(of_name)
    for names in cost.products():
        graph.add_edges_from(itertools.combinations({name for name in names if name in of_name}, 2))
    shared: list[Item] = []
    while True:
        blocks = [sorted(block) for block in nx.connected_components(graph)]
        together = [block for block in blocks if len(block) > 1]
        large = [b for b in together if math.prod(len(of_name[n].choices) for n in b) > _MOST_TOGETHER]
        if not large:
            return shared, [[of_name[name] for name in block] for block in blocks]
        most = max(large[0], key=lambda name: (graph.degree[name], name))
        graph.remove_node(most)
        shared.append(of_name[most])


def _tried(shared: Sequence[Item]) -> Iterator[list[Item]]:
    """Yield the items that are tried one by one with each joint choice as their only one."""
    if math.prod(len(item.choices) for item in shared) > _MOST_TRIED:
        raise BudgetError(
            f"the cost ties {len(shared)} groups to too many others to compare all layouts",
            "raise width_multiple, or choose fewer kinds (recipe: prune.width_multiple, prune.kinds)",
        )
    for picked in itertools.product(*(range(len(item.choices)) for item in shared)):
        yield [
            replace(item, choices=(item.choices[i],), lost=(item.lost[i],))
            for item, i in zip(shared, picked, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Options:
    """What can be chosen for a block: costs, losses and units removed of each item, all (options,)."""

    cost: Numbers
    lost: Numbers
    removed: Mapping[str, NDArray[np.int64]]


def _options(block: Sequence[Item], cost: CostFunction) -> _Options:
    """Return all joint choices of a block's items, at its terms of the cost."""
    grids = np.meshgrid(*(np.arange(len(item.choices)) for item in block), indexing="ij")
    picked = {item.name: grid.ravel() for item, grid in zip(block, grids, strict=True)}
    removed = {item.name: np.array(item.choices)[picked[item.name]] for item in block}
    lost = sum(np.array(item.lost)[picked[item.name]] for item in block)
    costs = cost.involving(removed)({item.name: item.size - removed[item.name] for item in block})
    return _Options(np.zeros(grids[0].size) + costs, np.zeros(grids[0].size) + lost, removed)


@dataclass(frozen=True, slots=True)
class _States:
    """Different costs that the blocks so far can come to, each with the least that is lost on the way.

    Attributes:
        cost: (states,).
        lost: (states,).
        steps: For each block its options, and for each state the state before it and the option taken.
    """

    cost: Numbers
    lost: Numbers
    steps: tuple[tuple[_Options, NDArray[np.int64], NDArray[np.int64]], ...] = ()

    @classmethod
    def at(cls, cost: float, lost: float) -> _States:
        """Return the one state that there is before the first block."""
        return cls(np.array([float(cost)]), np.array([float(lost)]))

    def extended(self, options: _Options, most: int | None) -> _States:
        """Return the states after one more block, at most so many."""
        cost = (self.cost[:, None] + options.cost).ravel()
        lost = (self.lost[:, None] + options.lost).ravel()
        kept = _least_lost(cost, lost, most)
        before, taken = np.divmod(kept, len(options.cost))
        return _States(cost[kept], lost[kept], (*self.steps, (options, before, taken)))

    def nearest(
        self, goal: float, tolerance: float, *, below: float
    ) -> tuple[tuple[float, ...], Allocation] | None:
        """Return the best allocation that costs less than `below`, with what it is judged by; smaller is better."""
        away = np.abs(self.cost - goal)
        outside = away > tolerance
        ranks = (outside, np.where(outside, away, self.lost), np.where(outside, self.lost, away))
        order = np.lexsort(ranks[::-1])
        order = order[self.cost[order] < below]
        if not len(order):
            return None
        best = int(order[0])
        found = Allocation(self._removed(best), float(self.cost[best]), float(self.lost[best]))
        return tuple(float(rank[best]) for rank in ranks), found

    def _removed(self, state: int) -> dict[str, int]:
        removed: dict[str, int] = {}
        for options, before, taken in reversed(self.steps):
            removed |= {name: int(counts[taken[state]]) for name, counts in options.removed.items()}
            state = int(before[state])
        return removed


def _least_lost(cost: Numbers, lost: Numbers, most: int | None) -> NDArray[np.int64]:
    """Return which of some (cost, lost) pairs to follow: of each cost the one with the least lost."""
    order = np.lexsort((lost, cost))
    first = np.ones(len(order), dtype=bool)
    first[1:] = np.diff(cost[order]) > 0
    kept = order[first]
    if most is None or len(kept) <= most:
        return kept
    low, high = cost[kept[0]], cost[kept[-1]]
    like = ((cost[kept] - low) * (most / (high - low))).astype(np.int64)
    order = np.lexsort((lost[kept], like))
    first = np.ones(len(order), dtype=bool)
    first[1:] = np.diff(like[order]) > 0
    return kept[order[first]]
