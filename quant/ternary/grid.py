"""The ternary grid of a row: a low level, zero and a high level, and the cuts beyond which a weight is not zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from quant.errors import QuantError

Levels = Literal["fitted", "extremes"]
LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TernaryGrid:
    """What the symbols 1 and 2 of each row stand for, and which weights get them. All are float32 (..., rows).

    Attributes:
        low: The level of symbol 1, at most 0; a bfloat16 number.
        high: The level of symbol 2, at least 0; a bfloat16 number.
        low_cut: Weights below it are low.
        high_cut: Weights above it are high; all others are zero.
    """

    low: Tensor
    high: Tensor
    low_cut: Tensor
    high_cut: Tensor

    def symbols(self, weight: Tensor) -> Tensor:
        """Return the symbol of each weight (..., rows, columns): uint8 of the same shape."""
        high = (weight > self.high_cut[..., None]).to(torch.uint8)
        return high.mul_(2).add_(weight < self.low_cut[..., None])

    def values(self, symbols: Tensor) -> Tensor:
        """Return what the symbols (..., rows, columns) stand for: float32 of the same shape."""
        return ternary_values(symbols, self.low[..., None], self.high[..., None])


def ternary_values(symbols: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return `low` for symbol 1, `high` for symbol 2, else zero; all broadcast, in the dtype of the levels."""
    return torch.where(symbols == 2, high, torch.where(symbols == 1, low, torch.zeros_like(low)))


def row_grid(weight: Tensor, levels: Levels = "fitted", zeros: float | None = None) -> TernaryGrid:
    """Choose the grid of each row.

    Args:
        weight: float32 (..., rows, columns), finite, at least one column.
        levels: "extremes" for the paper's grid, each row's least and largest weight; "fitted" for the means of
            what lies beyond the cuts, the least squared error that the same cuts, and so the same rate, allow.
        zeros: Share of each row's weights to make zero, the smallest ones; None cuts half way to the row's least
            and largest weight, as in the paper.

    Raises:
        QuantError: An argument is out of range.

    Source: QMoE (arXiv 2310.16795) section 3; its code, `quant.py`.
    """
    check_grid(levels, zeros)
    least, largest = weight.amin(dim=-1).clamp(max=0), weight.amax(dim=-1).clamp(min=0)
    if zeros is None:
        low_cut, high_cut = least / 2, largest / 2
    else:
        smallest = max(1, round(zeros * weight.shape[-1]))
        high_cut = weight.abs().kthvalue(smallest, dim=-1).values
        low_cut = -high_cut
    low, high = least, largest
    if levels == "fitted":
        low = _mean_where(weight, weight < low_cut[..., None], least)
        high = _mean_where(weight, weight > high_cut[..., None], largest)
    return TernaryGrid(low=as_stored(low), high=as_stored(high), low_cut=low_cut, high_cut=high_cut)


def as_stored(level: Tensor) -> Tensor:
    """Round to the nearest finite bfloat16 number: float32."""
    return level.clamp(-LARGEST, LARGEST).to(torch.bfloat16).to(torch.float32)


def check_grid(levels: str, zeros: float | None) -> None:
    """Raise QuantError unless `row_grid` takes these arguments."""
    if levels not in get_args(Levels):
        raise QuantError(f"there are no {levels!r} levels", f"use one of {', '.join(get_args(Levels))}")
    if zeros is not None and not 0 < zeros < 1:
        raise QuantError(f"a share of {zeros} zeros", "use a number between 0 and 1, such as 0.885, or None")


def _mean_where(weight: Tensor, chosen: Tensor, unit: Tensor) -> Tensor:
    """Return the mean of a row's chosen weights, 0 without any; `unit` bounds them, so that no sum overflows."""
    safe = torch.where(unit != 0, unit, torch.ones_like(unit))
    total = torch.where(chosen, weight / safe[..., None], 0).sum(dim=-1)
    return total / chosen.sum(dim=-1).clamp(min=1) * safe
