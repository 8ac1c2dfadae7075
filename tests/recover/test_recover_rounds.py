"""When a phase ends, and which round remains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.recover.rounds import Round, best_round, is_exhausted


def rounds(*degradations):
    return [
        Round("text", place, place, {}, {}, dict(zip("ab", values, strict=False)))
        for place, values in enumerate(degradations)
    ]


@pytest.mark.parametrize(
    ("reached", "over"),
    [
        ([(1.0, 1.0)], False),
        ([(1.0, 1.0), (1.0, 1.0)], False),
        ([(1.0, 1.0), (0.995, 1.0), (0.995, 1.0)], True),
        ([(1.0, 1.0), (1.0, 1.0), (1.0, 0.98)], False),  # one source is enough
        ([(1.0, 1.0), (0.98, 1.0), (0.99, 1.0)], False),  # an improvement within patience
        ([(1.0, 1.0), (0.5, 1.0), (0.6, 1.0), (0.501, 1.0)], True),  # back to what it was is none
        ([(1.0, 1.0), (0.5, 1.0), (0.6, 1.0), (0.4, 2.0)], False),
    ],
)
def test_a_phase_is_over_when_no_source_improved_within_patience(reached, over):
    assert is_exhausted(rounds(*reached), ["a", "b"], least_improvement=0.01, patience=2) == over


def test_only_the_sources_of_the_phase_are_asked():
    reached = rounds((1.0, 1.0), (1.0, 0.5))
    assert is_exhausted(reached, ["a"], least_improvement=0.01, patience=1)
    assert not is_exhausted(reached, ["a", "b"], least_improvement=0.01, patience=1)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=8))
def test_the_best_round_is_the_earliest_with_the_least_mean(reached):
    place = best_round(rounds(*reached))
    means = [(first + second) / 2 for first, second in reached]
    assert means[place] == min(means)
    assert means[place] not in means[:place]
