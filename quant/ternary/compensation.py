"""Error-compensated ternary rounding, many experts at a time: each column's error moves into the columns after it."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.ternary.grid import TernaryGrid

BLOCK = 128
"""Columns whose errors reach the columns after the block together, in one product."""


def compensated_symbols(
    weight: Tensor, covariance: Tensor, grid: TernaryGrid, damping: float = 0.1
) -> Tensor:
    """Round each column in turn and let the columns after it make up for the error on the inputs.

    Args:
        weight: float32 (experts, rows, columns).
        covariance: float32 (experts, columns, columns): X^T X of each expert's inputs, of any scale.
        grid: Of the weight's rows.
        damping: Share of the mean diagonal that is added to the diagonal.

    Returns:
        The symbols, uint8 of the weight's shape; the nearest ones for experts whose covariance has no Cholesky
        factor.

    Source: Frantar et al., GPTQ (arXiv 2210.17323) algorithm 1; QMoE (arXiv 2310.16795) section 3.2.
    """
    influence = _influence(covariance, damping)
    weight, symbols = weight.clone(), torch.empty_like(weight, dtype=torch.uint8)
    columns = weight.shape[-1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        part, inner = weight[..., start:stop], influence[:, start:stop, start:stop]
        errors = torch.empty_like(part)
        for column in range(stop - start):
            now = part[..., column : column + 1]
            symbols[..., start + column : start + column + 1] = symbol = grid.symbols(now)
            errors[..., column : column + 1] = error = now - grid.values(symbol)
            part[..., column + 1 :] -= error * inner[:, column : column + 1, column + 1 :]
        weight[..., stop:] -= errors @ influence[:, start:stop, stop:]
    return symbols


def squared_output_error(error: Tensor, covariance: Tensor) -> Tensor:
    """Return ``trace(E C E^T)`` of each expert: float64 (experts,).

    Args:
        error: float32 (experts, rows, columns).
        covariance: float32 (experts, columns, columns).
    """
    return ((error @ covariance) * error).sum(dim=(-2, -1), dtype=torch.float64).clamp(min=0)


def _influence(covariance: Tensor, damping: float) -> Tensor:
    """Return how much of a column's error each later column makes up for: row i of U / U_ii, with U^T U = C^-1.

    A Cholesky factor of the covariance read backwards is that of its inverse, so nothing is inverted but a triangle.
    """
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1)
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))[:, None, None]
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex((covariance / unit + damping * identity).flip(-2, -1))
    factor = torch.where((failed == 0)[:, None, None], factor.flip(-2, -1), identity)
    upper = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True)
    return upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]
