"""Latency as a cost: sums of measured products, monotone, and a budget of it; nothing here measures time."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama, traced

from graphprune.errors import BudgetError
from graphprune.prune import timing
from graphprune.prune.allocation import Item, allocate
from graphprune.prune.budget import allot
from graphprune.prune.contractions import Product
from graphprune.prune.costs import Measured, cost_named
from graphprune.prune.latency import RESOLUTION, Table, Tabulated, isotonic
from graphprune.prune.target import recipe_budget
from graphprune.prune.timing import TimeTable, time_product
from graphprune.recipe import Prune

SEQUENCE = 13


def macs_of(product):
    return product.batch * product.rows * product.inner * product.columns


def noisy(product):
    """A time that rises with the work, but for noise that depends on the sizes alone."""
    noise = (hash((product.batch, product.inner, product.columns)) % 1000) / 1000
    return (100 + macs_of(product)) * (1 + 0.3 * noise) * 1e-9


def costs(own, names, times, tokens=1):
    measured = Measured(
        own.groups,
        set(dict(own.model.named_parameters())),
        sequence=SEQUENCE,
        tokens=tokens,
        times=times,
    )
    return cost_named("latency", measured, names), cost_named("macs", measured, names)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def own(request):
    return traced(tiny_llama(attn_implementation=request.param))


@pytest.fixture(scope="module")
def wide():
    """Many units to choose from."""
    return traced(tiny_llama(num_hidden_layers=3))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", ["ffn", "attention_heads"])
def test_were_each_product_as_slow_as_it_is_large_latency_would_be_macs(own, kind, tokens):
    names = own.of_kind(kind)
    latency, macs = costs(own, names, macs_of, tokens)
    size = own.groups[names[0]].size
    assert latency() == pytest.approx(tokens * macs())
    for kept in range(1, size + 1):
        assert latency({names[0]: kept}) == pytest.approx(tokens * macs({names[0]: kept}))
        assert latency(dict.fromkeys(names, kept)) == pytest.approx(tokens * macs(dict.fromkeys(names, kept)))


def test_it_never_rises_where_units_go(own):
    names = [*own.of_kind("ffn"), *own.of_kind("attention_heads")]
    latency, _ = costs(own, names, noisy)
    for name in names:
        curve = latency({name: np.arange(own.groups[name].size + 1)})
        assert (np.diff(curve) >= 0).all()
        assert curve[-1] == pytest.approx(latency())
        assert curve[1] < curve[-1]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_isotonic_is_the_nearest_ascending_sequence(values):
    """By the formula of minima and maxima of means, which pools nothing."""
    array, count = np.array(values), len(values)
    expected = [
        max(min(array[j : k + 1].mean() for k in range(i, count)) for j in range(i + 1)) for i in range(count)
    ]
    np.testing.assert_allclose(isotonic(array), expected, atol=1e-12)


def test_a_table_goes_through_measurements_that_ascend():
    table = Table.of({4: 3.0, 2: 1.0, 8: 5.0})
    np.testing.assert_allclose(table([0, 1, 2, 3, 4, 6, 8]), [0, 0.5, 1, 2, 3, 4, 5])


def test_measurements_that_fall_are_put_together():
    table = Table.of({1: 5.0, 2: 3.0, 3: 6.0})
    np.testing.assert_allclose(table([1, 1.5, 2, 3]), [4, 4, 4, 6])


@pytest.mark.parametrize("remove", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_the_budget_is_reached_within_a_step(wide, layout, remove):
    names = wide.of_kind("ffn")
    latency, _ = costs(wide, names, noisy)
    curves = {name: np.linspace(0, 1 + place, 49) for place, name in enumerate(names)}
    budget = allot(wide.groups, curves, latency, remove=remove, layout=layout)
    kept = budget.kept_units(wide.groups)
    assert budget.unit == "latency"
    assert budget.after == pytest.approx(float(latency(kept)))
    assert budget.removed_share == pytest.approx(1 - float(latency(kept) / latency()))
    units = len(names) if layout == "uniform" else 1
    # One unit's saving where it is largest, which with noise is more than the least saving.
    step = units * max(np.diff(latency({name: np.arange(1, 49)})).max() for name in names) / latency()
    assert abs(budget.removed_share - remove) <= max(step, RESOLUTION)
    if layout == "per_layer":  # what loses least goes first
        assert budget.removed_units.get(names[0], 0) >= budget.removed_units.get(names[2], 0)


def test_differences_that_are_noise_do_not_decide():
    """A choice that saves next to nothing makes no step: else only the nearest cost would count, whatever is lost."""
    own = traced(tiny_llama())
    names = own.of_kind("ffn")

    def flat(product):
        return 1.0 if product.inner == product.columns else 1.0 + 1e-7 * (product.inner + product.columns)

    latency, _ = costs(own, names, flat)
    curves = {names[0]: np.zeros(49), names[1]: np.linspace(0, 1, 49)}
    budget = allot(own.groups, curves, latency, remove=1e-3, layout="per_layer")
    assert budget.removed_units.keys() == {names[0]}


TABLES = st.lists(st.floats(0, 9), min_size=4, max_size=4).map(
    lambda steps: Table(np.arange(5.0), np.concatenate([[0.0], np.cumsum(steps)]))
)


@given(st.lists(st.tuples(st.sampled_from("abc"), TABLES), min_size=1, max_size=5), st.floats(0.05, 0.9))
def test_the_knapsack_is_exact_on_tables(tables, remove):
    function = Tabulated(3.0, tuple(tables), resolution=0.0)
    names = sorted({name for name, _ in tables})
    items = [Item(name, 4, (0, 1, 2, 3), (0.0, 1.0 + place, 3.0, 9.0)) for place, name in enumerate(names)]

    def value(kept):
        return 3.0 + sum(float(np.interp(kept[name], table.widths, table.seconds)) for name, table in tables)

    before = value(dict.fromkeys(names, 4))
    every = [dict(zip(names, picked)) for picked in itertools.product((4, 3, 2, 1), repeat=len(names))]
    cheaper = [kept for kept in every if value(kept) < before - 1e-6]
    if not cheaper:
        return
    goal = before * (1 - remove)
    found = allocate(items, function, goal=goal, tolerance=0.5)
    kept = {name: 4 - found.removed[name] for name in names}
    assert found.cost == pytest.approx(value(kept))
    losses = {item.name: item.lost for item in items}

    def lost(kept):
        return sum(losses[name][4 - kept[name]] for name in names)

    near = [lost(kept) for kept in cheaper if abs(value(kept) - goal) <= 0.5 - 1e-9]
    if near:
        assert lost(kept) <= min(near) + 1e-9
    some = {names[0]: 2}
    parts = function.fixed(some).renamed(dict.fromkeys(names, "x"))
    rest = dict.fromkeys(names[1:], 3)
    assert parts({"x": 3}) == pytest.approx(value({**rest, **some}))
    assert function.involving(names[:1])(dict.fromkeys(names, 4)) + function.involving(names[1:])(
        dict.fromkeys(names, 4)
    ) == pytest.approx(before - 3.0)


def test_widths_that_share_a_matrix_are_refused(own):
    with pytest.raises(BudgetError, match="are widths of one matrix product"):
        costs(own, [*own.of_kind("ffn"), *own.of_kind("hidden")], macs_of)
    with pytest.raises(BudgetError, match="needs measured times"):
        costs(own, own.of_kind("ffn"), None)


class Counting:
    def __init__(self):
        self.asked = []

    def __call__(self, product):
        self.asked.append(product)
        return macs_of(product) * 1e-9


def test_measurements_are_kept_and_those_of_another_machine_are_not_read(tmp_path, own, monkeypatch):
    path = tmp_path / "latency.json"
    first = Counting()
    settings = Prune(budget="latency", remove=0.2, width_multiple={}, latency_tokens=3, sequence=SEQUENCE)
    scores = {
        name: torch.arange(1.0, group.size + 1)
        for name, group in own.groups.items()
        if group.kind in settings.kinds and group.prunable
    }
    counted = set(dict(own.model.named_parameters()))

    def budget(measure):
        times = TimeTable(path, measure=measure)
        return recipe_budget(own.groups, settings, scores, counted=counted, times=times)

    found = budget(first)
    assert len(set(first.asked)) == len(first.asked) > 0
    assert {product.rows for product in first.asked} == {3}
    written = json.loads(path.read_text())
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert written["machine"]["dtype"] == "float32"
    again = Counting()
    assert budget(again) == found
    assert again.asked == []
    monkeypatch.setattr(timing, "processor", lambda: "another one")
    other = Counting()
    budget(other)
    assert sorted(other.asked) == sorted(first.asked)
    path.write_text("{")
    broken = Counting()
    budget(broken)
    assert len(broken.asked) == len(first.asked)


def test_no_elements_take_no_time():
    assert TimeTable(measure=lambda _: 1.0)(Product(1, 3, 0, 4)) == 0


@pytest.mark.parametrize("product", [Product(1, 2, 3, 4), Product(5, 1, 3, 2)])
def test_the_median_of_repeats_counts_for_each_copy(product, monkeypatch):
    monkeypatch.setattr(timing, "_COLD_BYTES", 4 * 4 * product.batch * product.inner * product.columns)
    laps = iter([900.0, 8.0, 100.0, 4.0, 12.0, 4.0, 80.0, 4.0])  # the first is the warm-up
    ticks = itertools.chain.from_iterable((0.0, lap) for lap in laps)
    assert time_product(product, clock=lambda: next(ticks)) == 8.0 / 4
