"""Bias compensation: the mean of what redundant units contribute moves into the consumers' biases.

Source: FLAP (arXiv 2312.11983): y = W_k x_k + W_r x_r becomes W_k x_k + (b + W_r E[x_r]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import ShrinkError, TrainingError
from graphprune.prune.repair.activations import Calibration, Redundant, gone_indices, sources, summed
from graphprune.saliency.consumers import Consumer
from graphprune.saliency.effective import EffectiveWeight, effective_weights
from graphprune.saliency.gates import Gates
from graphprune.shrink.plan import Plan


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant in the place of redundant indices of an activation.

    Attributes:
        values: E[x] where redundant, zero elsewhere (indices,).
    """

    values: Tensor

    def __call__(self, source: Tensor) -> Tensor:
        """Return the constant in the shape of the activation."""
        return self.values.to(source.dtype).expand_as(source)


class Bias:
    """Means of the gated activations, which stand in for what goes, and end in biases.

    Args:
        model: The gated model.
        groups: Its node groups.
        gates: Its gates; means become their stand-ins.
        calibration: Text.

    Raises:
        TrainingError: If a layer that reads gated units has no place for a bias, or there is no text.
    """

    def __init__(self, model: nn.Module, groups: NodeGroups, gates: Gates, calibration: Calibration) -> None:
        self._model, self._groups, self._gates = model, groups, gates
        self._weights = _weights(model, groups, gates)
        if not calibration.fitted:
            raise TrainingError(
                "a repair is calibrated on text, and there is none",
                "give a window or more, or repair nothing (recipe: prune.calibration_windows, prune.repair)",
            )
        sums = summed(model, gates, calibration.batches, calibration.run, _sum_and_count)
        self._means = {source: (total[:-1] / total[-1]).float() for source, total in sums.items()}

    def update(self, redundant: Redundant) -> None:
        """Let means stand in for what is redundant now."""
        for source, consumer in sources(self._gates).items():
            gone = gone_indices(consumer, redundant)
            if bool(gone.any()):
                mean = self._means[source]
                self._gates.stand_ins[source] = Constant(mean * gone.to(mean.device))

    def cut(self, plan: Plan, shrink: Callable[[], nn.Module]) -> nn.Module:
        """Return the smaller model with what its layers lost added to their biases, new ones where there were none.

        Raises:
            ShrinkError: If it is a traced graph, in which a layer without a bias gets none.
        """
        added: list[tuple[str, Tensor]] = []
        for consumer, weight in self._weights:
            stand_in = self._gates.stand_ins.get(consumer.source)
            if isinstance(stand_in, Constant):
                lost = torch.cat([chunk.effective @ stand_in.values for chunk in weight.chunks()])
                added.append((consumer.parameter, self._staying(consumer, lost, plan)))
        small = shrink()
        for parameter, contribution in added:
            _add_bias(small, parameter.rpartition(".")[0], contribution)
        return small

    def _staying(self, consumer: Consumer, whole: Tensor, plan: Plan) -> Tensor:
        """Return of a consumer's outputs those that stay."""
        axes = self._groups.axes(consumer.parameter)
        if axes is None:
            return whole
        kept = self._groups.keep(axes[1 - consumer.axis], self._groups.selection(plan.kept(self._groups)))
        return whole[torch.as_tensor(kept, device=whole.device)]


def _weights(model: nn.Module, groups: NodeGroups, gates: Gates) -> list[tuple[Consumer, EffectiveWeight]]:
    """Return the linear layers that read gated units, with their weights in effect."""
    adapted = effective_weights(model, groups)
    factors = {term.down for weight in adapted.values() for term in weight.terms}
    found = []
    for consumer in gates.consumers:
        name = consumer.parameter
        if consumer.dim not in (-1, None) or name in factors:
            continue
        shape = groups.graph.weights[name].shape
        if (
            consumer.dim is None
            or len(shape) != 2
            or not hasattr(model.get_submodule(name.rpartition(".")[0]), "bias")
        ):
            raise TrainingError(
                f"{name} reads units that may go, and its layer has no place for a bias",
                "repair by least squares, or leave this kind out of kinds (recipe: prune.repair, prune.kinds)",
            )
        found.append((consumer, adapted.get(name) or EffectiveWeight(model, name, consumer.axis, shape)))
    return found


def _add_bias(model: nn.Module, path: str, contribution: Tensor) -> None:
    layer: Any = model.get_submodule(path)
    known = getattr(layer, "bias", None)
    if known is None and isinstance(model, GraphModule):
        raise ShrinkError(
            f"{path} has no bias, and in the traced graph that the smaller model is it gets none",
            "use least squares as the repair",
        )
    values = contribution if known is None else known.detach().float() + contribution
    like = layer.weight if known is None else known
    layer.bias = nn.Parameter(values.to(like.dtype), requires_grad=like.requires_grad)


def _sum_and_count(tokens: Tensor) -> Tensor:
    return torch.cat([tokens.sum(0, dtype=torch.float64), tokens.new_full((1,), len(tokens)).double()])
