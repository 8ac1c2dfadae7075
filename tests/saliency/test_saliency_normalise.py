"""Scores made comparable across kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FFN, KV_HEADS

from graphprune.saliency.normalise import normalised_by_kind

KINDS = ("ffn", "attention_heads")


def random_scores(traced, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    names = [name for kind in KINDS for name in traced.of_kind(kind)]
    return {name: torch.rand(traced.groups[name].size, generator=generator) + shift for name in names}


@given(seed=st.integers(0, 10**6), factors=st.tuples(*[st.floats(1e-6, 1e6)] * 2))
def test_the_unit_of_measure_of_a_kind_does_not_matter(seed, factors, llama):
    scores = random_scores(llama, seed)
    groups = [llama.groups[name] for name in scores]
    scaled = {name: scores[name] * factors[KINDS.index(llama.groups[name].kind)] for name in scores}
    found, expected = normalised_by_kind(scaled, groups), normalised_by_kind(scores, groups)
    for name in scores:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=0)


@given(seed=st.integers(0, 10**6), shift=st.sampled_from([0.0, -0.5, -3.0, 2.0]))
def test_each_kind_is_worth_what_it_costs_and_keeps_its_order(seed, shift, llama):
    scores = random_scores(llama, seed, shift)
    normalised = normalised_by_kind(scores, [llama.groups[name] for name in scores])
    for kind in KINDS:
        before = torch.cat([scores[name] for name in llama.of_kind(kind)])
        after = torch.cat([normalised[name] for name in llama.of_kind(kind)])
        costs = sum(
            llama.groups[name].size * llama.groups[name].parameters_per_unit for name in llama.of_kind(kind)
        )
        assert float(after.sum()) == pytest.approx(costs, rel=1e-4)
        assert bool((after >= 0).all())
        assert torch.equal(before.argsort(stable=True), after.argsort(stable=True))


def test_a_cost_of_ones_own():
    """Two kinds of the same cost a unit: the mean unit of each is worth that."""

    class Group:
        parameters_per_unit = 0

        def __init__(self, name, kind, size):
            self.name, self.kind, self.size = name, kind, size

    groups = [Group("a", "ffn", 2), Group("b", "attention_heads", 4)]
    scores = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([10.0, 10.0, 10.0, 50.0])}
    found = normalised_by_kind(scores, groups, {"a": 5.0, "b": 5.0})
    assert found["a"].tolist() == [2.5, 7.5]
    assert found["b"].tolist() == [2.5, 2.5, 2.5, 12.5]


def test_scores_of_nothing_stay_nothing(llama):
    name = llama.of_kind("ffn")[0]
    scores = {name: torch.zeros(FFN)}
    assert torch.equal(normalised_by_kind(scores, [llama.groups[name]])[name], torch.zeros(FFN))


def test_no_kind_starves_the_other(llama):
    """Ranked by score per parameter, the least third of the parameters comes from both kinds."""
    scores = random_scores(llama, 0)
    for name in llama.of_kind("attention_heads"):
        scores[name] *= 1e4  # as raw sums over many more weights are
    normalised = normalised_by_kind(scores, [llama.groups[name] for name in scores])
    ranked = sorted(
        (float(value) / llama.groups[name].parameters_per_unit, llama.groups[name].kind)
        for name, values in normalised.items()
        for value in values
    )
    assert {kind for _, kind in ranked[: (2 * FFN + 2 * KV_HEADS) // 2]} == set(KINDS)
