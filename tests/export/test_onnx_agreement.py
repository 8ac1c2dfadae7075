"""How far predictions agree, against the definitions in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graphprune.export.agreement import measure_agreement

VOCABULARY = 7


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits that two models have for each token."""
    generator = np.random.default_rng(seed)
    one = generator.standard_normal((VOCABULARY, VOCABULARY))
    return one.astype(np.float32), (one + 0.8 * generator.standard_normal(one.shape)).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_are_those_of_the_definitions(seed: int) -> None:
    one, other = tables(seed)
    texts = [np.array([[0, 1, 2, 3]]), np.array([[4, 5], [6, 1]])]
    found = measure_agreement(lambda ids: one[ids], lambda ids: other[ids], texts)
    tokens = np.concatenate([ids.ravel() for ids in texts])
    q, p = (np.exp(logits[tokens].astype(np.float64)) for logits in (one, other))
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    assert found.tokens == len(tokens)
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-9)
    assert found.top1_agreement == float((one[tokens].argmax(-1) == other[tokens].argmax(-1)).mean())
    assert found.max_abs_error == pytest.approx(float(np.abs(one[tokens] - other[tokens]).max()), rel=1e-6)


def test_some_of_these_models_disagree_and_none_does_with_itself() -> None:
    text = [np.arange(VOCABULARY)[None]]
    shares = []
    for seed in range(5):
        one, other = tables(seed)
        shares.append(
            measure_agreement(lambda ids, t=one: t[ids], lambda ids, t=other: t[ids], text).top1_agreement
        )
        alike = measure_agreement(lambda ids, t=one: t[ids], lambda ids, t=one: t[ids], text)
        assert (alike.max_abs_error, alike.top1_agreement, alike.kl) == (0, 1, 0)
    assert min(shares) < 1


def test_one_logit_that_is_no_number_is_not_overlooked() -> None:
    one, other = tables(0)
    one[3, 2] = math.nan
    found = measure_agreement(
        lambda ids: one[ids], lambda ids: other[ids], [np.array([[3]]), np.array([[1]])]
    )
    assert math.isnan(found.max_abs_error)
    assert not all(check.holds is not False for check in found.checks)
