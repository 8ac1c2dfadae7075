"""Lloyd-Max levels: those of least squared error on a normal distribution (Lloyd, 1982; Max, 1960)."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

from quant.codebooks import register_format

CONVERGED = 1e-12


def lloyd_max_levels(bits: int) -> list[float]:
    """Return the ``2 ** bits`` levels of the Lloyd-Max quantizer of a normal distribution, the outermost being 1.

    Each level is the mean of its cell, each cell ends half way between two levels; the iteration ends where
    both hold.
    """
    normal = NormalDist()
    count = 2**bits
    levels = [normal.inv_cdf((k + 0.5) / count) for k in range(count)]
    change = math.inf
    while change > CONVERGED:
        edges = [-math.inf, *((low + high) / 2 for low, high in pairwise(levels)), math.inf]
        means = [_mean_between(normal, low, high) for low, high in pairwise(edges)]
        change = max(abs(old - new) for old, new in zip(levels, means, strict=True))
        levels = means
    return [(levels[k] - levels[-1 - k]) / (2 * levels[-1]) for k in range(count)]


def _mean_between(normal: NormalDist, low: float, high: float) -> float:
    def density(x: float) -> float:
        return 0.0 if math.isinf(x) else normal.pdf(x)

    def below(x: float) -> float:
        return float(x > 0) if math.isinf(x) else normal.cdf(x)

    return (density(low) - density(high)) / (below(high) - below(low))


@register_format("lloyd4", bits=4, fitted=True)
def _lloyd4() -> list[float]:
    return lloyd_max_levels(4)


@register_format("lloyd3", bits=3, fitted=True)
def _lloyd3() -> list[float]:
    return lloyd_max_levels(3)


@register_format("lloyd2", bits=2, fitted=True)
def _lloyd2() -> list[float]:
    return lloyd_max_levels(2)
