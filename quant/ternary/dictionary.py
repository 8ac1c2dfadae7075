"""The dictionary of QMoE: the 2^16 most probable words of ternary symbols; a 16-bit code stands for each.

Symbols (0: zero, 1: low, 2: high) are taken in pairs, so there are nine letters. With p(0) = zeros / 1000 and the
two others equally probable, a word's probability depends on its length and on how many of its symbols are not zero
alone: words of one such class are equally probable. Classes are ranked by exact integers, and within the last one,
of which a part is taken, words go in the order of their symbols. So p(0) alone gives the same dictionary on every
machine, and no file need hold it.

A prefix and a suffix of a word are more probable than the word, so they are words too. By the first a row can end
anywhere; by the second, taking the longest word each time gives the fewest codes that any parse can give.

Source: Frantar and Alistarh, QMoE (arXiv 2310.16795) section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from quant.errors import QuantError

WORDS = 1 << 16
PAIRS = 9
FEWEST_ZEROS, MOST_ZEROS = 340, 990
"""Per mille. Below, no symbol is more probable than another; above, words are not long enough to gain more."""
SHORTEST, LONGEST = 5, 64
"""Limits of a word's pairs; with fewer than five there would not be 2^16 words."""


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """Words by code: short words first, words of one length in the order of their symbols.

    Attributes:
        zeros: The p(0) for which the words are the most probable ones, in per mille.
        longest: The most pairs in a word.
        symbols: uint8, 1-D: the symbols of all words, end to end.
        starts: int32 (65536,): where each word starts in `symbols`.
        lengths: int32 (65536,): symbols in each word, an even number.
        children: int32 (65537, 9): the code of the word that is one pair (3 first + second) longer, or -1; the
            last row is that of the empty word, which has no code.
    """

    zeros: int
    longest: int
    symbols: NDArray[np.uint8] = field(repr=False)
    starts: NDArray[np.int32] = field(repr=False)
    lengths: NDArray[np.int32] = field(repr=False)
    children: NDArray[np.int32] = field(repr=False)


def best_longest(zeros: int) -> int:
    """Return the most pairs in a word that code well at this p(0), in per mille.

    The paper's 14 leave no rate below 16 / 28 bits; 24 save 2 to 28 % from p(0) = 0.885 to 0.95.
    """
    return 24 if zeros <= 950 else 64


@lru_cache(maxsize=16)
def dictionary(zeros: int, longest: int) -> Dictionary:
    """Build the dictionary for a p(0).

    Args:
        zeros: p(0) in per mille, from 340 to 990; 885 in the paper.
        longest: The most pairs in a word, from 5 to 64; 14 in the paper.

    Raises:
        QuantError: An argument is out of range.
    """
    if not (FEWEST_ZEROS <= zeros <= MOST_ZEROS and SHORTEST <= longest <= LONGEST):
        raise QuantError(
            f"there is no dictionary for a p(0) of {zeros} per mille and words of up to {longest} pairs",
            f"use {FEWEST_ZEROS} to {MOST_ZEROS} per mille and {SHORTEST} to {LONGEST} pairs",
        )
    words = np.zeros((WORDS, 2 * longest), np.uint8)
    children = np.full((WORDS + 1, PAIRS), -1, np.int32)
    lengths = np.zeros(WORDS, np.int32)
    pairs_of = np.arange(PAIRS)
    nonzero_of = np.minimum(pairs_of // 3, 1) + np.minimum(pairs_of % 3, 1)
    # Words grow by a pair at a time; parents in order, times pairs in order, are children in order.
    level, nonzero, code = np.array([WORDS]), np.array([0]), 0
    for pairs, quota in enumerate(_quotas(zeros, longest), start=1):
        parent, pair = np.repeat(level, PAIRS), np.tile(pairs_of, len(level))
        nonzero = np.repeat(nonzero, PAIRS) + np.tile(nonzero_of, len(level))
        kept = _first_of_each(nonzero, quota)
        parent, pair, nonzero = parent[kept], pair[kept], nonzero[kept]
        level = np.arange(code, code + len(parent))
        code += len(parent)
        children[parent, pair] = level
        lengths[level] = 2 * pairs
        if pairs > 1:
            words[level] = words[parent]
        words[level, 2 * pairs - 2], words[level, 2 * pairs - 1] = pair // 3, pair % 3
    return Dictionary(
        zeros=zeros,
        longest=longest,
        symbols=words[np.arange(2 * longest) < lengths[:, None]],
        starts=(lengths.cumsum() - lengths).astype(np.int32),
        lengths=lengths,
        children=children,
    )


def _quotas(zeros: int, longest: int) -> NDArray[np.int64]:
    """Return how many words there are of each length (row 0: one pair) and number of nonzero symbols (column)."""
    classes = [(pairs, nonzero) for pairs in range(1, longest + 1) for nonzero in range(2 * pairs + 1)]

    def improbability(of: tuple[int, int]) -> tuple[int, int, int]:
        pairs, nonzero = of
        # The probability p(0)^(2 pairs - nonzero) ((1 - p(0)) / 2)^nonzero, times 2000^(2 longest).
        scaled = (2 * zeros) ** (2 * pairs - nonzero) * (1000 - zeros) ** nonzero
        return -scaled * 2000 ** (2 * (longest - pairs)), pairs, nonzero

    quotas = np.zeros((longest, 2 * longest + 1), np.int64)
    room = WORDS
    for pairs, nonzero in sorted(classes, key=improbability):
        quotas[pairs - 1, nonzero] = min(room, comb(2 * pairs, nonzero) * 2**nonzero)
        room -= int(quotas[pairs - 1, nonzero])
    return quotas


def _first_of_each(classes: NDArray[np.int64], quota: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which entries are among the first `quota[class]` of their class."""
    kept = np.zeros(len(classes), np.bool_)
    for one in np.flatnonzero(quota):
        kept[np.flatnonzero(classes == one)[: quota[one]]] = True
    return kept
