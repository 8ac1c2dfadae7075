"""Closed-form repair: what redundant units did, as far as the others can do it, moves into the consumers' weights.

The activations x_r of redundant indices are predicted from those x_k that stay by least squares with a ridge,

    x_r ≈ C x_k,   C = E[x_r x_kᵀ] (E[x_k x_kᵀ] + λI)⁻¹,

so that W_k x_k + W_r x_r becomes (W_k + W_r C) x_k. While gates fade, the prediction takes the place of the share that
they take away; at the end it is folded into the weights, and nothing of it remains to be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from graphprune.saliency.gates import Consumer, Gates

RIDGE = 0.01
"""λ as a share of the mean second moment."""


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


class Repair:
    """Second moments of the gated activations, and the predictions that follow from them.

    Args:
        model: The gated model.
        gates: Its gates; predictions become their stand-ins.
        batches: Calibration text, token ids (batch, window).
        run: Runs the model on a batch; its result is not looked at.
    """

    def __init__(
        self, model: nn.Module, gates: Gates, batches: Iterable[Tensor], run: Callable[[Tensor], object]
    ) -> None:
        self._model = model
        self._gates = gates
        self._consumers: dict[str, Consumer] = {}
        for consumer in gates.consumers:
            if consumer.dim == -1:
                self._consumers.setdefault(consumer.source, consumer)
        self._moments = self._observe(batches, run)

    def update(self, redundant: Callable[[str], Tensor]) -> None:
        """Predict what is redundant now.

        Args:
            redundant: From a group's name to a mask (units,) of its redundant units.
        """
        for source, consumer in self._consumers.items():
            gone = torch.zeros(len(next(iter(consumer.owners.values()))), dtype=torch.bool)
            for name, owner in consumer.owners.items():
                gone |= (owner >= 0) & redundant(name).cpu()[owner.clamp_min(0)]
            if bool(gone.any()) and not bool(gone.all()):
                self._gates.stand_ins[source] = _predict(self._moments[source], gone)

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

    def _observe(self, batches: Iterable[Tensor], run: Callable[[Tensor], object]) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = {}

        def add(source: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach().flatten(0, -2).float()
            moments[source] = moments.get(source, 0) + rows.T @ rows

        handles = [
            self._model.get_submodule(consumer.parameter.rpartition(".")[0]).register_forward_pre_hook(
                partial(add, source), prepend=True
            )
            for source, consumer in self._consumers.items()
        ]
        try:
            with torch.no_grad(), self._gates.opened():
                for batch in batches:
                    run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return moments


def _predict(moment: Tensor, gone: Tensor) -> Prediction:
    out, stay = torch.nonzero(gone).flatten(), torch.nonzero(~gone).flatten()
    inner = moment[stay][:, stay]
    inner = inner + RIDGE * inner.diagonal().mean().clamp_min(1e-12) * torch.eye(len(stay))
    factor = torch.linalg.cholesky(inner)
    coefficients = torch.cholesky_solve(moment[stay][:, out], factor).T
    return Prediction(out, stay, coefficients.contiguous())
