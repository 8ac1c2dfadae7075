"""Which scale, and offset, a block of weights gets: its largest weight, its range, or what fits it best."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.codebooks import Format

# Tried as shares of the scale that covers the whole block; each is then refitted by least squares.
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)
REFITS = 3
# Blocks are fitted so many weights at a time, so that what is compared stays in the cache.
CHUNK = 1 << 17


def covering_scales(blocks: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Return the least scales, and for an affine format offsets, whose levels span the blocks.

    Args:
        blocks: float32 (blocks, size).
        format: Of the codes.

    Returns:
        float32 (blocks,) twice, or None for the offsets of a format without them.
    """
    if not format.affine:
        return torch.linalg.vector_norm(blocks, torch.inf, dim=1), None
    low, high = blocks.amin(dim=1), blocks.amax(dim=1)
    # Halves first: the difference of two large weights may leave float32's range.
    return high / 2 - low / 2, high / 2 + low / 2


def fitted_scales(
    blocks: Tensor, format: Format, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return scales, and for an affine format offsets, of nearly the least squared error.

    From each of a few shares of the covering scale, rounding and a least-squares refit alternate (Lloyd's
    iteration with the levels held in proportion); the best found is returned, never worse than covering.

    Args:
        blocks: float32 (blocks, size).
        format: Of the codes.
        importance: What a squared error of each weight counts, broadcastable to `blocks`; None for all alike.

    Returns:
        As `covering_scales`.
    """
    found = [
        _fit(part, format, None if importance is None else importance.expand_as(blocks)[rows])
        for rows, part in _chunks(blocks)
    ]
    offsets = [offset for _, offset in found if offset is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(offsets) if offsets else None


def _chunks(blocks: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, CHUNK // blocks.shape[1])
    for start in range(0, len(blocks), step):
        rows = slice(start, start + step)
        yield rows, blocks[rows]


def _fit(blocks: Tensor, format: Format, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # In units of the covering scale no product below leaves float32's range, however large the weights.
    unit, middle = covering_scales(blocks, format)
    safe = torch.where(unit > 0, unit, torch.ones_like(unit))[:, None]
    centred = (blocks if middle is None else blocks - middle[:, None]) / safe
    best = _Best(len(blocks), centred)
    for share in SHARES:
        scale, offset = centred.new_full((len(blocks),), share), centred.new_zeros(len(blocks))
        for refit in range(REFITS):
            levels = _rounded(centred, format, scale, offset)
            best.offer(centred, levels, importance, scale, offset)
            if refit < REFITS - 1:
                scale, offset = _least_squares(centred, levels, importance, format.affine)
    scale = best.scale * unit
    return scale, None if middle is None else best.offset * unit + middle


class _Best:
    """The best scale and offset of each block so far."""

    def __init__(self, count: int, like: Tensor) -> None:
        self.error = like.new_full((count,), torch.inf)
        self.scale = like.new_zeros(count)
        self.offset = like.new_zeros(count)

    def offer(
        self, blocks: Tensor, levels: Tensor, importance: Tensor | None, scale: Tensor, offset: Tensor
    ) -> None:
        squared = (blocks - levels * scale[:, None] - offset[:, None]).square_()
        error = (squared if importance is None else squared.mul_(importance)).sum(dim=1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.offset = torch.where(better, offset, self.offset)


def _rounded(blocks: Tensor, format: Format, scale: Tensor, offset: Tensor) -> Tensor:
    scaled = ((blocks - offset[:, None]) / scale[:, None]).clamp_(-1, 1)
    return format.levels.to(blocks.device)[format.nearest(scaled).to(torch.int32)]


def _least_squares(
    blocks: Tensor, levels: Tensor, importance: Tensor | None, affine: bool
) -> tuple[Tensor, Tensor]:
    """Return the scale and offset that best map each block's levels to its weights; the offset 0 unless affine."""
    weighted = levels if importance is None else levels * importance
    if affine:
        total = (
            blocks.new_full((len(blocks),), blocks.shape[1]) if importance is None else importance.sum(dim=1)
        )
        level_mean = weighted.sum(dim=1) / total
        block_mean = (blocks if importance is None else blocks * importance).sum(dim=1) / total
        variance = (weighted * levels).sum(dim=1) - total * level_mean.square()
        covariance = (weighted * blocks).sum(dim=1) - total * level_mean * block_mean
    else:
        variance = (weighted * levels).sum(dim=1)
        covariance = (weighted * blocks).sum(dim=1)
        level_mean = block_mean = torch.zeros_like(variance)
    # One level alone, or no likeness: any scale does, and the covering one is on offer already.
    usable = (variance > 1e-6) & (covariance > 1e-6 * variance)
    scale = torch.where(usable, covariance / variance, torch.ones_like(variance))
    return scale, block_mean - scale * level_mean
