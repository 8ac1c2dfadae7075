"""The mix keeps its floor and follows degradation; batches follow the mix, and repeat."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.recover.mix import Mixer, mixture, rows_by_source
from graphprune.source.text import IGNORED, Windows

LOSSES = st.lists(st.floats(-5, 50), min_size=1, max_size=6).map(
    lambda values: {f"s{place}": value for place, value in enumerate(values)}
)
FLOORS, TEMPERATURES = st.floats(0, 1), st.floats(1e-3, 10)


@given(LOSSES, FLOORS, TEMPERATURES)
def test_shares_add_up_to_one_and_keep_the_floor(degradation, floor, temperature):
    mix = mixture(degradation, floor=floor, temperature=temperature)
    assert list(mix) == list(degradation)
    assert math.fsum(mix.values()) == pytest.approx(1, abs=1e-12)
    assert min(mix.values()) >= floor / len(mix) * (1 - 1e-12)


@given(LOSSES, FLOORS, TEMPERATURES)
def test_a_more_degraded_source_gets_no_less(degradation, floor, temperature):
    mix = mixture(degradation, floor=floor, temperature=temperature)
    ordered = sorted(mix, key=degradation.get)
    assert all(mix[a] <= mix[b] for a, b in pairwise(ordered))


def test_the_mix_is_the_formula():
    """Two sources of which one is worse by the temperature: it gets e times as much of what the floor leaves."""
    mix = mixture({"a": 0.1, "b": 0.35}, floor=0.4, temperature=0.25)
    assert (mix["b"] - 0.2) / (mix["a"] - 0.2) == pytest.approx(math.e)
    assert mixture({"a": 0.1, "b": 3.0}, floor=1, temperature=0.25) == {"a": 0.5, "b": 0.5}


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(sum), st.integers(1, 40), st.integers(0, 1000)
)
def test_a_batch_is_as_near_to_the_mix_as_whole_rows_can_be(weights, size, step):
    shares = [weight / sum(weights) for weight in weights]
    counts = rows_by_source(shares, size, seed=0, step=step)
    assert sum(counts) == size
    assert all(abs(count - size * share) < 1 + 1e-9 for count, share in zip(counts, shares, strict=True))
    assert counts == rows_by_source(shares, size, seed=0, step=step)


def test_over_many_steps_rows_are_the_mix():
    shares = [0.07, 0.61, 0.32]
    total = torch.tensor([rows_by_source(shares, 4, seed=1, step=step) for step in range(4000)]).sum(0)
    torch.testing.assert_close(total / 16000, torch.tensor(shares), atol=5e-3, rtol=0)


def numbered(start, count):
    return Windows(torch.arange(start, start + count)[:, None].repeat(1, 3), f"from {start}")


def drawn(mixer, shares, step, count):
    return [batch.ids[:, 0].tolist() for batch in islice(mixer.batches(shares, step), count)]


def test_every_window_comes_once_before_any_comes_again():
    batches = drawn(Mixer([numbered(0, 6), numbered(100, 6)], 4, seed=2), [0.5, 0.5], 0, 6)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == sorted([*range(6), *range(100, 106)] * 2)
    assert all(sum(row >= 100 for row in batch) == 2 for batch in batches)


@pytest.mark.parametrize("done", [1, 5, 9])
def test_a_mixer_goes_on_where_another_stopped(done):
    texts, shares = [numbered(0, 5), numbered(100, 7)], [0.3, 0.7]
    straight = drawn(Mixer(texts, 3, seed=4), shares, 0, 20)
    first = Mixer(texts, 3, seed=4)
    assert drawn(first, shares, 0, done) == straight[:done]
    second = Mixer(texts, 3, seed=4, drawn=first.drawn)
    assert drawn(second, shares, done, 20 - done) == straight[done:]
    assert drawn(Mixer(texts, 3, seed=5), shares, 0, 20) != straight


def test_one_text_alone_is_drawn_as_its_own_batches():
    text = numbered(0, 7)
    expected = [ids[:, 0].tolist() for ids in islice(text.batches(3, seed=8), 9)]
    assert drawn(Mixer([text], 3, seed=8), [1.0], 0, 9) == expected


def test_columns_after_the_last_learned_token_are_left_out():
    ids = torch.arange(12).reshape(2, 6)
    labels = torch.full((2, 6), IGNORED)
    labels[0, 2:4] = ids[0, 2:4]
    labels[1, 1] = ids[1, 1]
    batch = next(Mixer([Windows(ids, "asked", labels)], 2, seed=0).batches([1.0], 0))
    assert batch.ids.shape == batch.labels.shape == (2, 4)
    assert batch.counted == 3
