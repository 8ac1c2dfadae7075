"""How much of each source a round trains on, and which windows make up each step's batch."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice

import torch

from graphprune.source.text import Batch, Windows


def mixture(degradation: Mapping[str, float], *, floor: float, temperature: float) -> dict[str, float]:
    """Return the share of each source in the next round (LoRAShear, Alg. 5).

    The paper asks for more of the most degraded sources and a balanced share of the others, and gives no formula.
    Ours: floor / n for each, and the rest in proportion to exp(degradation / temperature), the weights of dynamic
    batch loading (Sheared LLaMA, arXiv 2310.06694) without their memory of earlier rounds.

    Args:
        degradation: Loss above the dense model's in nats per token, by source.
        floor: Share that all sources share equally, in 0 to 1.
        temperature: In nats per token; the smaller, the more goes to the most degraded.

    Returns:
        Shares that add up to 1, in the order of `degradation`.
    """
    worst = max(degradation.values())
    weights = {name: math.exp((value - worst) / temperature) for name, value in degradation.items()}
    total = sum(weights.values())
    return {name: floor / len(weights) + (1 - floor) * weight / total for name, weight in weights.items()}


def rows_by_source(shares: Sequence[float], size: int, *, seed: int, step: int) -> list[int]:
    """Return how many of a batch's rows come from each source: its share, rounded up or down at random.

    Systematic sampling, so that a batch is as near to the mix as whole rows can be, and the mean is the mix. It
    depends on the seed and the number of the step alone.
    """
    offset = random.Random(f"{seed}/{step}").random()
    bounds = list(accumulate(shares))[:-1]
    counts = [0] * len(shares)
    for row in range(size):
        counts[bisect_right(bounds, (row + offset) / size)] += 1
    return counts


class Mixer:
    """Draws batches from several texts, each of which is gone through whole before any window comes again.

    Args:
        texts: All with windows of one length.
        size: Rows of a batch.
        seed: Of the order of windows and of rounding.
        drawn: How many windows of each text an interrupted training had drawn; it goes on after them.
    """

    def __init__(
        self, texts: Sequence[Windows], size: int, seed: int, drawn: Sequence[int] | None = None
    ) -> None:
        self._texts = texts
        self._size = size
        self._seed = seed
        self.drawn = list(drawn) if drawn else [0] * len(texts)
        self._orders = [
            islice(text.order(seed + place), self.drawn[place], None) for place, text in enumerate(texts)
        ]

    def batches(self, shares: Sequence[float], step: int) -> Iterator[Batch]:
        """Yield batches for ever.

        Args:
            shares: Of each text, adding up to 1.
            step: Number of the first batch.
        """
        while True:
            counts = rows_by_source(shares, self._size, seed=self._seed, step=step)
            parts = [self._next(place, count).batch for place, count in enumerate(counts) if count]
            yield Batch(
                torch.cat([part.ids for part in parts]), torch.cat([part.labels for part in parts])
            ).trimmed
            step += 1

    def _next(self, place: int, count: int) -> Windows:
        self.drawn[place] += count
        return self._texts[place].chosen(torch.tensor(list(islice(self._orders[place], count))))
