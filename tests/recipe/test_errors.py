"""Errors: one message of two lines, the same again where it was raised in another process."""

from __future__ import annotations

import pickle  # noqa: TID251 -- a user may raise in another process; no file of ours is written so

import pytest

from graphprune.errors import GraphPruneError, OperatorShrinkError
from quant.errors import QuantError


def kinds(base: type[Exception]) -> list[type[Exception]]:
    """Return a class and all that derive from it."""
    return [base, *(kind for derived in base.__subclasses__() for kind in kinds(derived))]


@pytest.mark.parametrize("kind", [*kinds(GraphPruneError), QuantError])
def test_an_error_comes_back_from_a_pickle_as_it_was(kind):
    where = ("/lm_head/MatMul",) if kind is OperatorShrinkError else ()
    error = kind(*where, "the problem", "the remedy")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is kind
    assert str(again) == str(error) == "the problem\n  → the remedy"
    assert vars(again) == vars(error)
