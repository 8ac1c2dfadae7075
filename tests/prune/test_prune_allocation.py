"""The knapsack, against looking at every allocation there is."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import BudgetError
from graphprune.prune import allocation
from graphprune.prune.allocation import Item, allocate, smallest_step
from graphprune.prune.polynomial import Polynomial

SHAPES = {
    "apart": [("a",), ("b",), ("c",), ("d",)],
    "pairs": [("a", "b"), ("a",), ("c", "d"), ("c",)],
    "one with all": [("a", "b"), ("a", "c"), ("a", "d"), ("a", "b", "c")],
    "squares": [("a", "a"), ("a", "b"), ("c",), ("d", "d")],
}


@st.composite
def problems(draw):
    items = []
    for name in draw(st.sampled_from(["ab", "abc", "abcd"])):
        size = draw(st.integers(2, 7))
        choices = (0, *sorted(draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=4))))
        losses = draw(st.lists(st.integers(0, 50), min_size=len(choices) - 1, max_size=len(choices) - 1))
        items.append(Item(name, size, choices, (0.0, *(x / 7 for x in itertools.accumulate(losses)))))
    shape = draw(st.sampled_from(sorted(SHAPES)))
    names = {item.name for item in items}
    terms = {(): float(draw(st.integers(0, 40)))}
    for product in SHAPES[shape]:
        if set(product) <= names:
            terms[product] = draw(st.integers(1, 30)) / draw(st.sampled_from([1, 3]))
    return items, Polynomial(terms), draw(st.floats(0.02, 0.9))


def every_allocation(items, cost):
    """Yield cost and loss of each allocation but that which removes nothing."""
    before = cost({item.name: item.size for item in items})
    for picked in itertools.product(*(range(len(item.choices)) for item in items)):
        kept = {item.name: item.size - item.choices[i] for item, i in zip(items, picked)}
        if cost(kept) < before - 1e-9:
            yield cost(kept), sum(item.lost[i] for item, i in zip(items, picked))


@pytest.mark.parametrize("together", [4096, 4], ids=["blocks", "one by one"])
@settings(max_examples=150)
@given(problem=problems())
def test_nothing_loses_less_at_the_cost_asked_for(together, problem):
    items, cost, remove = problem
    step = smallest_step(items, cost)
    if step == math.inf:
        return
    goal = cost({item.name: item.size for item in items}) * (1 - remove)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_MOST_TOGETHER", together)
        found = allocate(items, cost, goal=goal, tolerance=step / 2)
    kept = {item.name: item.size - found.removed[item.name] for item in items}
    lost = sum(item.lost[item.choices.index(found.removed[item.name])] for item in items)
    assert found.cost == pytest.approx(cost(kept))
    assert found.lost == pytest.approx(lost)
    everything = list(every_allocation(items, cost))
    near = [lost for other, lost in everything if abs(other - goal) <= step / 2 - 1e-9]
    if near:
        assert abs(found.cost - goal) <= step / 2 + 1e-9
        assert found.lost <= min(near) + 1e-9
    else:
        assert abs(found.cost - goal) <= min(abs(other - goal) for other, _ in everything) + 1e-9


def test_what_is_worth_little_for_its_cost_goes_first():
    """Two items of the same loss: the larger saving; at the same saving: the smaller loss."""
    units = tuple(range(10))
    items = [
        Item("dear", 10, units, tuple(5.0 * u for u in units)),
        Item("cheap", 10, units, tuple(1.0 * u for u in units)),
        Item("large", 10, units, tuple(5.0 * u for u in units)),
    ]
    cost = Polynomial({("dear",): 1, ("cheap",): 1, ("large",): 10})
    assert allocate(items, cost, goal=111, tolerance=0.5).removed == {"dear": 0, "cheap": 9, "large": 0}
    assert allocate(items, cost, goal=21, tolerance=0.5).removed == {"dear": 0, "cheap": 9, "large": 9}


def test_many_different_costs_are_thinned_and_the_goal_is_met_all_the_same(monkeypatch):
    """No two costs alike, far more of them than are followed: close to the goal, and to what all of them give."""
    items, terms = [], {}
    for i in range(40):
        units = tuple(range(0, 30, 3))
        items.append(Item(f"i{i:02}", 30, units, tuple((1 + i % 7) * u**1.3 for u in units)))
        terms[(f"i{i:02}",)] = 100 + math.sqrt(i + 2)
    cost = Polynomial(terms)
    goal = 0.7 * cost({item.name: 30 for item in items})
    step = smallest_step(items, cost)
    fine = allocate(items, cost, goal=goal, tolerance=step / 2)
    monkeypatch.setattr(allocation, "MOST_STATES", 200)
    coarse = allocate(items, cost, goal=goal, tolerance=step / 2)
    for found in (fine, coarse):
        assert abs(found.cost - goal) <= step / 2
        assert found.cost == pytest.approx(
            cost({item.name: 30 - found.removed[item.name] for item in items}), rel=1e-12
        )
    assert fine.lost <= coarse.lost * 1.001
    assert coarse.lost <= fine.lost * 1.02


def test_nothing_to_lose_and_too_much_to_try_are_said():
    with pytest.raises(BudgetError, match="no item can lose a unit"):
        allocate([Item("a", 3, (0,), (0.0,))], Polynomial({("a",): 1}), goal=1, tolerance=1)
    units = tuple(range(100))
    items = [Item(name, 101, units, tuple(map(float, units))) for name in "abcdef"]
    tied = Polynomial(dict.fromkeys(itertools.combinations("abcdef", 2), 1.0))
    with pytest.raises(BudgetError, match="the cost ties"):
        allocate(items, tied, goal=1, tolerance=1)
