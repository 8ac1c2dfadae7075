"""Rows of ternary symbols to 16-bit codes of dictionary words and back, exactly."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from quant.errors import QuantError
from quant.ternary.dictionary import PAIRS, WORDS, Dictionary, dictionary

# Rows are encoded together, one pair of each at a time; more of them than this only cost memory.
ROWS_AT_ONCE = 8192
# Symbols are decoded so many at a time, so that what is indexed stays small.
SYMBOLS_AT_ONCE = 1 << 22


def encode(symbols: Tensor, words: Dictionary) -> tuple[Tensor, Tensor]:
    """Write each row as the longest words of the dictionary, one after another; no word crosses rows.

    Args:
        symbols: uint8 (rows, width) of 0, 1 and 2. To an odd width a zero is added.
        words: The dictionary.

    Returns:
        The codes, uint16 (codes,), row after row, and how many each row has, int64 (rows,); on the device of the
        symbols.
    """
    even = functional.pad(symbols, (0, symbols.shape[1] % 2))
    pairs = (3 * even[:, 0::2] + even[:, 1::2]).cpu().numpy()
    done = [
        _encode(pairs[start : start + ROWS_AT_ONCE], words) for start in range(0, len(pairs), ROWS_AT_ONCE)
    ]
    if not done:
        done = [(np.zeros(0, np.uint16), np.zeros(0, np.int64))]
    codes, row_codes = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*done, strict=True))
    return codes.to(symbols.device), row_codes.to(symbols.device)


def decode(codes: Tensor, row_codes: Tensor, width: int, zeros: int, longest: int) -> Tensor:
    """Return the symbols that `encode` wrote.

    Args:
        codes: uint16 (codes,).
        row_codes: Integers (rows,): the codes of each row.
        width: Of the rows.
        zeros: Of the dictionary.
        longest: Of the dictionary.

    Returns:
        uint8 (rows, width).

    Raises:
        QuantError: The codes do not stand for so many symbols.
    """
    even = width + width % 2
    counts = row_codes.to(torch.int64).split(max(1, SYMBOLS_AT_ONCE // max(1, even)))
    sizes = [int(count.sum()) for count in counts]
    parts = [_decode(part, zeros, longest) for part in codes.split(sizes)]
    if [part.numel() for part in parts] != [len(count) * even for count in counts]:
        raise QuantError(
            f"the codes do not stand for {len(row_codes)} rows of {width} symbols",
            "they are damaged: quantize the weight again",
        )
    return torch.cat(parts).view(len(row_codes), even)[:, :width]


def _encode(pairs: NDArray[np.uint8], words: Dictionary) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Return the codes of rows of pairs, and how many each row has."""
    rows, count = pairs.shape
    found = np.zeros((rows, count), np.uint16)
    row_codes = np.zeros(rows, np.int64)
    children = words.children.reshape(-1)
    word = np.full(rows, WORDS, np.int64)
    for pair in np.ascontiguousarray(pairs.T):
        longer = children[word * PAIRS + pair].astype(np.int64)
        ended = np.flatnonzero(longer < 0)
        found[ended, row_codes[ended]] = word[ended]
        row_codes[ended] += 1
        longer[ended] = children[WORDS * PAIRS + pair[ended].astype(np.int64)]
        word = longer
    if count:
        found[np.arange(rows), row_codes] = word
        row_codes += 1
    return found[np.arange(count) < row_codes[:, None]], row_codes


def _decode(codes: Tensor, zeros: int, longest: int) -> Tensor:
    """Return the symbols of consecutive codes: uint8, 1-D."""
    symbols, starts, lengths = _tables(zeros, longest, codes.device)
    wide = codes.to(torch.int32)
    length = lengths.index_select(0, wide)
    # Where a word lies among all words, less where it lies in the output: then one gather reads all of them.
    shift = starts.index_select(0, wide) - (length.cumsum(0) - length).to(torch.int32)
    index = torch.repeat_interleave(shift, length)
    index += torch.arange(len(index), dtype=torch.int32, device=index.device)
    return symbols.index_select(0, index)


@lru_cache(maxsize=16)
def _tables(zeros: int, longest: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return symbols, starts and lengths of a dictionary's words on a device."""
    words = dictionary(zeros, longest)
    tables = words.symbols, words.starts, words.lengths
    symbols, starts, lengths = (torch.from_numpy(table).to(device) for table in tables)
    return symbols, starts, lengths
