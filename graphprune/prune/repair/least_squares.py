"""Least squares: what redundant units did, as far as the others can do it, moves into the consumers' weights.

The activations x_r of redundant indices are predicted from those x_k that stay by least squares with a ridge,

    x_r ≈ C x_k,   C = E[x_r x_kᵀ] (E[x_k x_kᵀ] + λI)⁻¹,

so that W_k x_k + W_r x_r becomes (W_k + W_r C) x_k. While gates fade, the prediction takes the place of the share that
they take away; at the end it is folded into the weights, and nothing of it remains to be computed.

λ is chosen on windows that C is not fitted to. What C errs by there, E‖x_r − C x_k‖², follows from second moments as C
itself does, so that no activation is kept; with λ chosen, C is fitted to all windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.prune.repair.activations import Calibration, Redundant, gone_indices, sources, summed
from graphprune.saliency.gates import Gates
from graphprune.shrink.plan import Plan

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for λ, as shares of the mean second moment."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Redundant indices of an activation from those that stay.

    Attributes:
        gone: Redundant indices (gone,).
        kept: The others (kept,).
        coefficients: C, (gone, kept).
    """

    gone: Tensor
    kept: Tensor
    coefficients: Tensor

    def __call__(self, source: Tensor) -> Tensor:
        """Return the predictions in the places of redundant indices, zeros elsewhere."""
        predicted = source.index_select(-1, self.kept) @ self.coefficients.T.to(source.dtype)
        return torch.zeros_like(source).index_copy(-1, self.gone, predicted.to(source.dtype))

    def fold(self, weight: Tensor, axis: int) -> Tensor:
        """Return a weight that computes from the kept indices alone what it computed with predictions."""
        moved = weight.movedim(axis, -1).clone()
        moved[..., self.kept] += moved[..., self.gone] @ self.coefficients
        moved[..., self.gone] = 0
        return moved.movedim(-1, axis).contiguous()


class LeastSquares:
    """Second moments of the gated activations, and the predictions that follow from them.

    Args:
        model: The gated model.
        gates: Its gates; predictions become their stand-ins.
        calibration: Text, some of it held out.

    Raises:
        TrainingError: If there is nothing to fit to, or nothing held out.
    """

    def __init__(self, model: nn.Module, gates: Gates, calibration: Calibration) -> None:
        self._model = model
        self._gates = gates
        if not calibration.fitted or not calibration.held:
            raise TrainingError(
                "a ridge is chosen on text that nothing is fitted to, and there is "
                + ("but one window or batch" if calibration.fitted else "none"),
                "give 2 or more, or repair nothing (recipe: prune.calibration_windows, prune.repair)",
            )
        self._fitted, self._held = (
            summed(model, gates, part, calibration.run, lambda x: x.T @ x)
            for part in (calibration.fitted, calibration.held)
        )
        self._done: dict[str, Tensor] = {}

    def update(self, redundant: Redundant) -> None:
        """Predict what is redundant now, where that is not what it was."""
        for source, consumer in sources(self._gates).items():
            gone = gone_indices(consumer, redundant)
            known = self._done.get(source)
            if bool(gone.any()) and not bool(gone.all()) and (known is None or not torch.equal(known, gone)):
                self._gates.stand_ins[source] = predict(self._fitted[source], self._held[source], gone)
                self._done[source] = gone

    def cut(self, plan: Plan, shrink: Callable[[], nn.Module]) -> nn.Module:
        """Return the smaller model, cut while the weights hold the predictions."""
        with self.folded():
            return shrink()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Within the block the model's weights hold the repair; afterwards they are the very same as before."""
        originals: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for consumer in self._gates.consumers:
                prediction = self._gates.stand_ins.get(consumer.source)
                if isinstance(prediction, Prediction):
                    parameter = self._model.get_parameter(consumer.parameter)
                    originals.append((parameter, parameter.data))
                    parameter.data = prediction.fold(parameter.data, consumer.axis)
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data


def predict(fitted: Tensor, held: Tensor, gone: Tensor) -> Prediction:
    """Return the prediction with the ridge that errs least on held-out tokens.

    Args:
        fitted: Sum of x xᵀ over tokens to fit to (indices, indices).
        held: The same over held-out tokens.
        gone: Mask (indices,) of what is predicted.

    Raises:
        TrainingError: If the moments are not finite.
    """
    gone = gone.to(fitted.device)
    out, stay = torch.nonzero(gone).flatten(), torch.nonzero(~gone).flatten()
    to_fit, to_judge = _Blocks.of(fitted, out, stay), _Blocks.of(held, out, stay)
    errors: dict[float, float] = {}
    for ridge in RIDGES:
        coefficients = to_fit.coefficients(ridge)
        if coefficients is not None:
            errors[ridge] = to_judge.error(coefficients)
    whole = _Blocks.of(fitted + held, out, stay)
    for ridge in sorted(errors, key=errors.__getitem__):
        coefficients = whole.coefficients(ridge)
        if coefficients is not None:
            return Prediction(out, stay, coefficients.contiguous())
    raise TrainingError(
        "the second moments of what a layer reads are not finite, so nothing can be predicted from it",
        "repair nothing (recipe: prune.repair), or compute in float32",
    )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of a second moment: of x_k with itself (kept, kept), x_r with x_k (gone, kept), and ‖x_r‖² (gone,)."""

    inner: Tensor
    cross: Tensor
    squares: Tensor

    @classmethod
    def of(cls, moment: Tensor, out: Tensor, stay: Tensor) -> _Blocks:
        return cls(moment[stay][:, stay], moment[out][:, stay], moment.diagonal()[out])

    def coefficients(self, ridge: float) -> Tensor | None:
        """Return C, (gone, kept); None where rounding leaves the moments of x_k without a Cholesky factor."""
        scale = self.inner.diagonal().mean().clamp_min(1e-12)
        shifted = self.inner.clone()
        shifted.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        return None if int(failed) else torch.cholesky_solve(self.cross.T, factor).T

    def error(self, coefficients: Tensor) -> float:
        """Return the sum of ‖x_r − C x_k‖² over tokens."""
        explained = (coefficients * (2 * self.cross - coefficients @ self.inner)).sum()
        return float(self.squares.sum() - explained)
