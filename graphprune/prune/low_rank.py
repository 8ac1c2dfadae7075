"""The weights that adapters update, with the factors: what paper mode writes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.saliency.adapters import LowRankUpdate, low_rank_updates
from graphprune.trace.graph import OperatorGraph

ROWS = 1024
"""Rows of an update that are computed at a time: BA is never whole in memory."""


@dataclass(frozen=True, slots=True)
class AdaptedWeight:
    """A weight W to whose product a layer adds s BA.

    Attributes:
        name: W's qualified name.
        weight: W, (outputs, inputs), or (inputs, outputs) if transposed.
        transposed: Whether outputs are W's second axis.
        a: A, (rank, inputs).
        b: B, (outputs, rank).
        scale: s.
    """

    name: str
    weight: nn.Parameter
    transposed: bool
    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def merge(self) -> None:
        """Add s BA to W, and set B to zero: the layer computes what it did."""
        weight = self.weight.data.T if self.transposed else self.weight.data
        for rows, b in zip(weight.split(ROWS), self.b.data.split(ROWS), strict=True):
            wide = working_dtype(weight)
            rows.copy_(rows.to(wide).addmm(b.to(wide), self.a.data.to(wide), alpha=self.scale))
        self.b.data.zero_()


def working_dtype(weight: Tensor) -> torch.dtype:
    """Return the type to compute in on a weight: its own, at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def adapted_weights(model: nn.Module, graph: OperatorGraph) -> list[AdaptedWeight]:
    """Return the weights of a model that have adapters, as its graph shows them.

    Raises:
        TrainingError: If several adapters update a weight, or its numbers are not there to be written to.
    """
    return list(_found(model, graph))


def _found(model: nn.Module, graph: OperatorGraph) -> Iterator[AdaptedWeight]:
    for name, update in low_rank_updates(graph).items():
        weight = model.get_parameter(name)
        reason = _unsuited(weight, graph.weights[name].shape, update)
        if reason:
            raise TrainingError(
                f"LHSPG's paper mode cannot work on {name}: {reason}",
                "attach plain LoRA adapters to it, or use mode='gated'",
            )
        (term,) = update.factors
        a, b = model.get_parameter(term.down), model.get_parameter(term.up)
        yield AdaptedWeight(name, weight, update.input_axis == 0, a, b, term.scaling)


def _unsuited(weight: nn.Parameter, shape: tuple[int, ...], update: LowRankUpdate) -> str | None:
    """Return why W + s BA cannot be written to W, or None."""
    if len(update.factors) > 1:
        return "several adapters update it"
    if not weight.is_floating_point():
        return "it is quantized"
    return None if tuple(weight.shape) == tuple(shape) else f"it is held in a shape of {tuple(weight.shape)}"
