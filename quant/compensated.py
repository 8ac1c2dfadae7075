"""Rounding against a covariance: the errors of one row make up for each other.

First column by column, each error being spread over the columns still to come (GPTQ); then by coordinate descent:
a column at a time is rounded anew for the errors that all others have by now, and the scale and offset of a block
are refitted in closed form. No step of the descent raises the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.blockwise import block_scales
from quant.codebooks import Format, get_format
from quant.covariance import InputNorm
from quant.fit import covering_scales, fitted_scales
from quant.packing import pack
from quant.quantized import QuantizedTensor
from quant.scales import Storage, store_scales

# Columns that are rounded before their errors are taken to all others, where blocks cross rows.
COLUMNS = 64
SWEEPS = 4
"""Sweeps of coordinate descent that `quantize_compensated` makes."""
# A block of nearly one level says nothing of its scale and offset apart.
SMALLEST_DETERMINANT = 1e-4


def quantize_compensated(
    weight: Tensor,
    norm: InputNorm,
    format: str | int,
    block_size: int = 64,
    *,
    fitted: bool | None = None,
    scale_storage: Storage = "float32",
    sweeps: int = SWEEPS,
) -> QuantizedTensor:
    """Quantize a weight so that the error of its layer's outputs is small.

    Args:
        weight: (out_features, in_features), finite.
        norm: Of the layer's inputs.
        format: As in `quantize`.
        block_size: As in `quantize`.
        fitted: As in `quantize`; scales that are not fitted stay the least that cover their blocks.
        scale_storage: As in `quantize`.
        sweeps: Of coordinate descent; 0 for GPTQ alone.

    Returns:
        The packed weight, on the weight's device.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1, in the given order of columns. Coordinate
        descent on the same objective: Nair and Suggala, CDQuant (arXiv 2406.17542).
    """
    rounding = CompensatedRounding(weight, norm, format, block_size, fitted)
    for _ in range(sweeps):
        rounding.sweep()
    return rounding.packed(scale_storage)


class CompensatedRounding:
    """A weight on its way to codes; rounded once when made, better with each `sweep`.

    Everything is kept transposed, (in_features, out_features), so that a column lies in one piece.

    Args:
        weight: (out_features, in_features), finite.
        norm: Of the layer's inputs.
        format: As in `quantize`.
        block_size: As in `quantize`.
        fitted: As in `quantize`.
    """

    def __init__(
        self, weight: Tensor, norm: InputNorm, format: str | int, block_size: int, fitted: bool | None = None
    ) -> None:
        self.format: Format = get_format(format)
        self.fitted = self.format.fitted if fitted is None else fitted
        self.block_size = block_size
        self.covariance = norm.covariance
        self.target = weight.detach().to(torch.float32).T.contiguous()
        self.codes = torch.empty_like(self.target, dtype=torch.uint8)
        columns = len(self.target)
        # Blocks that cross rows belong to no column; their scales are chosen once, before any rounding.
        self.crossing = columns % block_size != 0
        self.step = COLUMNS if self.crossing else block_size
        self._scales: list[Tensor] = []
        self._offsets: list[Tensor | None] = []
        self._of_blocks: tuple[Tensor, Tensor | None] | None = None
        self._round_first(_inverse_factor(norm))

    def retarget(self, weight: Tensor) -> None:
        """Go on towards another weight of the same shape, from the codes and scales found so far."""
        self.target = weight.detach().to(torch.float32).T.contiguous()

    def sweep(self) -> None:
        """Round every column anew for the errors that the others have, and refit the scales of fitted formats."""
        error = self.target - self.dequantized().T
        pull = self.covariance @ error
        for index, start in enumerate(range(0, len(self.target), self.step)):
            columns = slice(start, min(start + self.step, len(self.target)))
            before = error[columns].clone()
            inner = self.covariance[columns, columns]
            here = pull[columns].clone()
            if self.fitted and not self.crossing:
                self._refit(index, columns, inner, here, error)
            self._round_again(index, columns, inner, here, error)
            pull.addmm_(self.covariance[:, columns], error[columns] - before)

    def dequantized(self) -> Tensor:
        """Return what the codes stand for, before scales are stored: float32 (out_features, in_features)."""
        levels = self.format.levels.to(self.codes.device)
        found = levels[self.codes.to(torch.int32)]
        for index, start in enumerate(range(0, len(found), self.step)):
            part = found[start : start + self.step]
            part.mul_(self._scales[index])
            offset = self._offsets[index]
            if offset is not None:
                part.add_(offset)
        return found.T

    def packed(self, scale_storage: Storage = "float32") -> QuantizedTensor:
        """Return the weight as it is rounded by now."""
        scales, offsets = self._of_blocks or (
            torch.stack(self._scales, dim=1).view(-1),
            _by_rows(self._offsets),
        )
        return QuantizedTensor(
            codes=pack(self.codes.T.contiguous(), self.format.bits),
            scales=store_scales(scales, scale_storage),
            offsets=None if offsets is None else store_scales(offsets, scale_storage),
            shape=(self.target.shape[1], self.target.shape[0]),
            format=self.format.name,
            block_size=self.block_size,
        )

    def _round_first(self, inverse: Tensor) -> None:
        left = self.target.clone()
        cost = inverse.diagonal().reciprocal().square()
        if self.crossing:
            self._choose_crossing_scales(cost)
        for index, start in enumerate(range(0, len(left), self.step)):
            columns = slice(start, min(start + self.step, len(left)))
            if not self.crossing:
                scale, offset = self._block_scales(left[columns], cost[columns])
                self._scales.append(scale)
                self._offsets.append(offset)
            errors = torch.empty_like(left[columns])
            for i, column in enumerate(range(columns.start, columns.stop)):
                value, self.codes[column] = self._nearest(left[column], index, i)
                errors[i] = (left[column] - value) / inverse[column, column]
                left[column + 1 : columns.stop].addr_(
                    inverse[column, column + 1 : columns.stop], errors[i], alpha=-1
                )
            left[columns.stop :].addmm_(inverse[columns, columns.stop :].T, errors, alpha=-1)

    def _round_again(self, index: int, columns: slice, inner: Tensor, pull: Tensor, error: Tensor) -> None:
        """Round each column to what is best for it, the others as they are."""
        for i, column in enumerate(range(columns.start, columns.stop)):
            wanted = self.target[column] - error[column] + pull[i] / inner[i, i]
            value, self.codes[column] = self._nearest(wanted, index, i)
            change = self.target[column] - value - error[column]
            error[column] += change
            pull.addr_(inner[i], change)

    def _refit(self, index: int, columns: slice, inner: Tensor, pull: Tensor, error: Tensor) -> None:
        """Move a block's scale and offset to where the error of the whole row is least."""
        levels = self.format.levels.to(error.device)[self.codes[columns].to(torch.int32)]
        spread = inner @ levels
        level_level, level_pull = (spread * levels).sum(dim=0), (levels * pull).sum(dim=0)
        offset = self._offsets[index]
        if offset is None:
            usable = level_level > 0
            scale_change = torch.where(usable, level_pull / level_level, torch.zeros_like(level_level))
            change = levels * scale_change
        else:
            level_one, one_one, one_pull = spread.sum(dim=0), inner.sum(), pull.sum(dim=0)
            determinant = level_level * one_one - level_one.square()
            usable = determinant > SMALLEST_DETERMINANT * level_level * one_one
            safe = torch.where(usable, determinant, torch.ones_like(determinant))
            scale_change = torch.where(usable, (level_pull * one_one - one_pull * level_one) / safe, 0.0)
            offset_change = torch.where(usable, (one_pull * level_level - level_pull * level_one) / safe, 0.0)
            change = levels * scale_change + offset_change
            self._offsets[index] = offset + offset_change
        self._scales[index] = self._scales[index] + scale_change
        error[columns] -= change
        pull.addmm_(inner, change, alpha=-1)

    def _nearest(self, weights: Tensor, index: int, i: int) -> tuple[Tensor, Tensor]:
        """Return the values that weights of a column are rounded to, and their codes."""
        scale, offset = self._scales[index], self._offsets[index]
        if self.crossing:
            scale, offset = scale[i], None if offset is None else offset[i]
        divisor = torch.where(scale != 0, scale, torch.ones_like(scale))
        centred = weights if offset is None else weights - offset
        codes = self.format.nearest((centred / divisor).clamp_(-1, 1))
        value = self.format.levels.to(codes.device)[codes.to(torch.int32)] * scale
        return value if offset is None else value + offset, codes

    def _block_scales(self, block: Tensor, cost: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = block.T.contiguous()
        if not self.fitted:
            return covering_scales(rows, self.format)
        return fitted_scales(rows, self.format, cost / cost.mean())

    def _choose_crossing_scales(self, cost: Tensor) -> None:
        columns, rows = self.target.shape
        importance = (cost / cost.mean()).repeat(rows) if self.fitted else None
        flat = self.target.T.reshape(-1)
        scales, offsets = block_scales(flat, self.format, self.block_size, self.fitted, importance)
        self._of_blocks = scales, offsets
        block = torch.arange(rows * columns, device=flat.device).view(rows, columns).T // self.block_size
        self._scales = list(scales[block].split(self.step))
        self._offsets = [None] * len(self._scales)
        if offsets is not None:
            self._offsets = list(offsets[block].split(self.step))


def _inverse_factor(norm: InputNorm) -> Tensor:
    """Return the upper U with ``U^T U`` the inverse covariance: its rows say how an error spreads."""
    inverse = torch.cholesky_inverse(norm.factor.to(torch.float64))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


def _by_rows(columns: Sequence[Tensor | None]) -> Tensor | None:
    """Return one number a block in row-major order, from those of each block column; None of none."""
    given = [column for column in columns if column is not None]
    return torch.stack(given, dim=1).view(-1) if given else None
