"""Knowledge distribution: measured on gates, as surgery would have it, and nothing is left behind."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama, traced

from graphprune.errors import RecipeError, RunFolderError
from graphprune.prune.distribution import Distribution, Sensitivity, measure_distribution
from graphprune.prune.target import recipe_distribution
from graphprune.prune.training import Objective, logits_of
from graphprune.recipe import Distribution as Asked
from graphprune.recipe import Prune, Training
from graphprune.report.distribution_picture import distribution_picture
from graphprune.saliency.gates import Gates
from graphprune.shrink.model import shrink
from graphprune.source.text import Windows

IDS = torch.arange(72).reshape(6, 12) % 60 + 3
RATIOS = (0.5, 0.25)


class Bench:
    """A tiny Llama of its own, and its distribution measured."""

    def __init__(self) -> None:
        self.own = traced(tiny_llama(seed=8))
        self.model, self.groups = self.own.model, self.own.groups
        self.names = self.own.of_kind("ffn") + self.own.of_kind("attention_heads")
        generator = torch.Generator().manual_seed(0)
        self.scores = {n: torch.rand(self.groups[n].size, generator=generator) for n in self.names}
        self.calls = 0

    def loss(self, ids):
        self.calls += 1
        return Objective(logits_of(self.model), None, 0.0, False)(ids)

    def measure(self, **options):
        gates = Gates(self.model, self.groups, self.names)
        try:
            settings = {"ratios": RATIOS, **options}
            return measure_distribution(gates, self.scores, IDS.split(4), self.loss, **settings)
        finally:
            gates.close()


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(scope="module")
def measured(bench):
    return bench.measure()


def test_the_rise_is_that_of_the_model_with_the_least_salient_units_cut_out(bench, measured):
    for name in (bench.names[0], bench.names[-1]):
        found = measured.groups[name]
        assert found.removed == ((12, 24) if bench.groups[name].size == 48 else (1,))
        order = bench.scores[name].argsort()
        for count, rise in zip(found.removed, found.rises):
            plan = {name: order[:count].tolist()}
            small = shrink(bench.model, bench.groups, plan, bench.own.inputs, form="module")
            with torch.no_grad():
                logits = small(input_ids=IDS).logits[:, :-1].double()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
            assert rise == pytest.approx(float(loss) - measured.loss, abs=2e-5)
            assert abs(rise) > 1e-4


def test_the_model_is_left_as_it_was_bit_for_bit(bench):
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    with torch.no_grad():
        logits = bench.model(input_ids=IDS).logits
    gates = Gates(bench.model, bench.groups, bench.names)
    with torch.no_grad():
        gates.values[bench.names[0]][3] = 0.25  # as training may have left it
    measure_distribution(gates, bench.scores, [IDS], bench.loss, ratios=RATIOS)
    assert gates.values[bench.names[0]][3] == 0.25
    assert all(int((value != 1).sum()) == (n == bench.names[0]) for n, value in gates.values.items())
    assert all(value.grad is None for value in gates.values.values())
    gates.close()
    with torch.no_grad():
        assert torch.equal(bench.model(input_ids=IDS).logits, logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in bench.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in bench.model.modules())


def test_gates_are_put_back_when_a_measurement_fails(bench):
    gates = Gates(bench.model, bench.groups, bench.names)

    def failing(ids):
        if any(bool((value == 0).any()) for value in gates.values.values()):
            raise KeyboardInterrupt
        return bench.loss(ids)

    with pytest.raises(KeyboardInterrupt):
        measure_distribution(gates, bench.scores, [IDS], failing, ratios=RATIOS)
    assert all(bool((value == 1).all()) for value in gates.values.values())
    gates.close()


def test_a_kill_loses_at_most_the_group_that_it_falls_into(bench, measured, tmp_path):
    path = tmp_path / "graph" / "distribution.json"

    def kill(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure(path=path, progress=kill)
    assert len(json.loads(path.read_text())["groups"]) == 2
    bench.calls = 0
    again = bench.measure(path=path)
    assert again == measured
    # Two batches for the whole model, for each ratio of a layer's channels, and for one head of each layer.
    left = bench.names[2:]
    assert bench.calls == 2 + 2 * sum(len(measured.groups[name].removed) for name in left)
    bench.calls = 0
    assert bench.measure(path=path) == measured
    assert bench.calls == 2


def test_what_was_measured_otherwise_is_measured_anew(bench, measured, tmp_path):
    path = tmp_path / "distribution.json"
    bench.measure(path=path)
    bench.calls = 0
    bench.measure(path=path, ratios=(0.25, 0.75))
    assert bench.calls > 2 + 2 * len(bench.names)
    assert bench.measure(path=path) == measured
    name, other = bench.names[0], Bench()
    other.scores[name] = -other.scores[name]  # other units of one group would be closed
    found = other.measure(path=path)
    assert other.calls == 2 + 2 * 2
    assert found.groups[name] != measured.groups[name]
    with torch.no_grad():  # another model
        other.model.model.norm.weight.mul_(0.5)
    other.calls = 0
    other.measure(path=path)
    assert other.calls > 2 + 2 * len(bench.names)


def test_a_foreign_file_is_refused(bench, tmp_path):
    path = tmp_path / "distribution.json"
    path.write_text("[1, 2")
    with pytest.raises(RunFolderError, match="is not a knowledge distribution"):
        bench.measure(path=path)


@pytest.mark.parametrize("ratios", [(), (0.0, 0.5), (0.5, 1.0)])
def test_ratios_are_shares(bench, ratios):
    with pytest.raises(RecipeError, match=r"prune\.distribution\.ratios"):
        bench.measure(ratios=ratios)


@given(st.integers(2, 40), st.data())
def test_a_curve_goes_through_what_was_measured_and_never_falls(size, data):
    removed = sorted(data.draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=4)))
    rises = data.draw(st.lists(st.floats(0, 5), min_size=len(removed), max_size=len(removed)))
    rising = Sensitivity(tuple(removed), tuple(np.cumsum(rises)))
    curve = rising.curve(size)
    assert curve.shape == (size + 1,)
    assert curve[0] == 0
    assert curve[removed] == pytest.approx(rising.rises)
    assert (np.diff(curve) >= -1e-12).all()
    assert (np.diff(curve[: removed[0] + 1]) == pytest.approx(curve[removed[0]] / removed[0])) or size < 2
    last = removed[-1]
    assert curve[size] >= curve[last] / last * size - 1e-9
    noisy = Sensitivity(tuple(removed), tuple(-rise for rise in rises))
    assert (noisy.curve(size) == 0).all()


def test_the_worst_share_of_groups():
    rises = {"a": 0.1, "b": 3.0, "c": -0.2, "d": 1.0}
    found = Distribution(2.0, {name: Sensitivity((1, 2), (0.0, rise)) for name, rise in rises.items()})
    assert found.most_sensitive(0.5) == ("b", "d")
    assert found.most_sensitive(0.49) == ("b",)
    assert found.most_sensitive(0.0) == ()


def test_the_recipe_measures_on_windows_that_units_are_not_scored_on(bench):
    windows = Windows(torch.randint(3, 60, (10, 12), generator=torch.Generator().manual_seed(1)), "text")
    asked = Asked(ratios=(0.5,), windows=3)
    settings = Prune(calibration_windows=6, distribution=asked, training=Training(batch_size=2))
    found = recipe_distribution(bench.model, bench.groups, settings, windows, bench.scores, seed=4)
    held_out = windows.drawn(10, 4)[6:9]
    with torch.no_grad():
        assert found.loss == pytest.approx(float(bench.loss(held_out)), rel=1e-6)
    assert set(found.groups) == set(bench.names)
    assert not any(module._forward_pre_hooks for module in bench.model.modules())
    off = settings.model_copy(update={"distribution": Asked()})
    assert recipe_distribution(bench.model, bench.groups, off, windows, bench.scores, seed=4) is None
    much = settings.model_copy(update={"calibration_windows": 8})
    with pytest.raises(RecipeError, match="asks for 3 windows beside the 8"):
        recipe_distribution(bench.model, bench.groups, much, windows, bench.scores, seed=4)


def test_the_picture_has_a_cell_for_each_measurement(bench, measured):
    rows = measured.rows(bench.groups)
    picture = distribution_picture(rows)
    assert picture == distribution_picture(rows)
    root = ET.fromstring(picture)
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ffn", "attention_heads", "25%", "50%"} <= set(texts)
    worst = max((row for row in rows if row["kind"] == "ffn"), key=lambda row: max(row["rises"]))
    assert f"at most {max(worst['rises']):+.3g} nats a token, {worst['name']}" in texts
    more = [*rows, {**rows[0], "name": "one more"}]
    cells = [text.count("stroke-width: 0.6") for text in (picture, distribution_picture(more))]
    assert cells[0] == sum(len(row["rises"]) for row in rows)
    assert cells[1] == cells[0] + len(rows[0]["rises"])
    assert distribution_picture([]) == ""
