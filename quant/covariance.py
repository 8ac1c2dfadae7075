"""What a layer's inputs say about its weight: the covariance of calibration activations as a norm for errors.

An error E of a weight changes the layer's outputs by ``x E^T``; over inputs with the second moment R their mean
square is ``||E L||^2`` for any L with ``L L^T = R``. A Cholesky factor serves as well as the symmetric root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import QuantError

DAMPING = 0.01
"""Share of the mean variance that is added to every input's: it bounds errors in directions never seen."""


@dataclass(frozen=True, slots=True, eq=False)
class InputNorm:
    """The norm ``||E L||`` of weight errors E (out_features, in_features).

    Attributes:
        covariance: float32 (in_features, in_features), damped.
        factor: float32 lower Cholesky factor L of it.
    """

    covariance: Tensor
    factor: Tensor

    @classmethod
    def of(cls, covariance: Tensor, damping: float = DAMPING) -> InputNorm:
        """Return the norm of a layer's mean ``x^T x``.

        Args:
            covariance: (in_features, in_features), symmetric, of any positive scale; it may be singular.
            damping: Share of the mean variance added to the diagonal; raised tenfold as often as it takes.

        Raises:
            QuantError: The covariance is not square and finite, or is all zeros.
        """
        _check(covariance)
        wide = covariance.detach().to(torch.float64)
        wide = wide / wide.diagonal().mean()
        while True:
            damped = _damped(wide, damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return cls(damped.to(torch.float32), factor.to(torch.float32))
            damping *= 10

    def error(self, error: Tensor) -> float:
        """Return ``||E L||`` of a float32 (out_features, in_features) error."""
        return float(torch.linalg.vector_norm(error @ self.factor))

    def whiten(self, error: Tensor) -> Tensor:
        """Return ``E L``, whose Frobenius norm is the error's norm here."""
        return error @ self.factor

    def unwhiten(self, whitened: Tensor) -> Tensor:
        """Return the ``M`` with ``M L = whitened`` for (rows, in_features)."""
        return torch.linalg.solve_triangular(self.factor, whitened, upper=False, left=False)


def propagated_target(weight: Tensor, covariance: Tensor, cross: Tensor, strength: float = 1.0) -> Tensor:
    """Return the weight that, on the inputs it will really get, comes nearest to what the layer once put out.

    When the layers before are quantized already, a layer gets ``x'`` in place of ``x``. Least squares on
    ``||x W^T - x' V^T||`` gives ``V = W C R^-1`` with ``C = E[x^T x']`` and ``R = E[x'^T x']``.

    Args:
        weight: (out_features, in_features).
        covariance: R, (in_features, in_features); damped here.
        cross: C, (in_features, in_features), on the same scale as R.
        strength: Share of the way from W to V that is taken; 1 trusts the calibration text fully.

    Returns:
        float32 (out_features, in_features).
    """
    wide = covariance.to(torch.float64)
    drift = weight.to(torch.float64) @ (cross.to(torch.float64) - wide)
    factor = torch.linalg.cholesky(_damped(wide))
    return (weight + strength * torch.cholesky_solve(drift.T, factor).T).to(torch.float32)


def _damped(wide: Tensor, share: float = DAMPING) -> Tensor:
    amount = share * wide.diagonal().mean()
    return wide + amount * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)


def _check(covariance: Tensor) -> None:
    shape = tuple(covariance.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise QuantError(f"a covariance of shape {shape}", "pass (in_features, in_features)")
    if not bool(covariance.isfinite().all()) or not float(covariance.diagonal().mean()) > 0:
        raise QuantError(
            f"the covariance of shape {shape} is not that of real inputs: zeros, nan or infinity",
            "calibrate on text that reaches this layer",
        )
    if not torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-5 * float(covariance.abs().max())):
        raise QuantError(
            f"a covariance of shape {shape} that is not symmetric",
            "pass the mean of x^T x over inputs x",
        )
