"""Gates: one scalar for each unit, on its whole contribution.

A unit's contribution is what its consumers read: the activations that go into `down_proj` for a channel, into
`o_proj` for a head. Scaling them scales the contribution linearly and leaves every weight alone, so that a gate of
zero is the unit removed, a gate of one the model as it was, and the gradient with respect to the gate what the unit
is worth. Works on a quantized base too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroup, NodeGroups
from graphprune.errors import TrainingError
from graphprune.saliency.norms import normed_weights
from graphprune.shrink.gated import GateHook

StandIn = Callable[[Tensor], Tensor]
"""From an activation (…, axis) to what takes the place of its gated share, of the same shape."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """A weight that reads gated activations.

    Attributes:
        parameter: Its qualified name.
        axis: The weight's axis that is contracted.
        source: Name of the activation that it reads; consumers of one activation share it.
        dim: The activation's axis that is contracted, as a dimension of the owning module's input.
        owners: For each gated group, the unit that owns each index of the axis, or -1.
    """

    parameter: str
    axis: int
    source: str
    dim: int
    owners: Mapping[str, Tensor]


class Gates:
    """Gates on the units of some groups, held by hooks on the modules that consume them.

    Args:
        model: The model; `close` takes the hooks off again.
        groups: Its node groups.
        names: Groups to gate.

    Attributes:
        groups: The gated groups, by name.
        values: One float32 parameter (units,) for each group, ones at first.
        consumers: The weights that read them.
        stand_ins: By activation, what takes the place of the share that gates take away; none at first.
    """

    def __init__(self, model: nn.Module, groups: NodeGroups, names: Iterable[str]) -> None:
        device = next(model.parameters()).device
        self.groups: dict[str, NodeGroup] = {name: groups[name] for name in names}
        self.values = {
            name: nn.Parameter(torch.ones(group.size, device=device)) for name, group in self.groups.items()
        }
        self.consumers = _consumers(groups, self.groups)
        self.stand_ins: dict[str, StandIn] = {}
        self._open = False
        # Consumers of one activation (a layer and its adapter) share its gated form, which is made once a pass.
        self._made: dict[str, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._handles = [
            model.get_submodule(consumer.parameter.rpartition(".")[0]).register_forward_pre_hook(
                self._hook(consumer)
            )
            for consumer in self.consumers
        ]

    def close(self) -> None:
        """Take the gates off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._made.clear()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within the block every gate is one, whatever its value: the model without any pruning."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def redundant(self) -> dict[str, list[int]]:
        """Return the units whose gate is exactly zero, by group."""
        return {
            name: torch.nonzero(value.detach() == 0).flatten().tolist() for name, value in self.values.items()
        }

    def release(self) -> None:
        """Let go of the last pass's activations, which are kept for as long as consumers may share them."""
        self._made.clear()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gates' gradients, and clear them.

        Raises:
            TrainingError: If a gate has none: the module that owns a consumer's weight is not called.
        """
        self.release()
        found = {}
        for name, value in self.values.items():
            if value.grad is None:
                raise TrainingError(
                    f"the units of '{name}' cannot be gated: no module that reads them is called",
                    "leave this kind out of kinds (recipe: prune.kinds)",
                )
            found[name] = value.grad
            value.grad = None
        return found

    def _hook(self, consumer: Consumer) -> GateHook:
        def scale(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._open:
                return None
            source, *rest = arguments
            made = self._made.get(consumer.source)
            if made is None or made[0]() is not source:
                made = self._made[consumer.source] = (weakref.ref(source), self._gated(consumer, source))
            return (made[1], *rest)

        return GateHook(scale)

    def _gated(self, consumer: Consumer, source: Tensor) -> Tensor:
        factor = self._factor(consumer.owners)
        if source.shape[consumer.dim] != factor.numel():
            raise TrainingError(
                f"the module that owns {consumer.parameter} reads an input of shape {tuple(source.shape)}, "
                f"and {factor.numel()} gates do not fit its axis {consumer.dim}",
                "leave this kind out of kinds (recipe: prune.kinds)",
            )
        shape = [1] * source.dim()
        shape[consumer.dim] = -1
        factor = factor.view(shape).to(source.dtype)
        stand_in = self.stand_ins.get(consumer.source)
        if stand_in is not None:
            return source * factor + (1 - factor) * stand_in(source)
        gated: Tensor = _Scaled.apply(source, factor)
        return gated

    def _factor(self, owners: Mapping[str, Tensor]) -> Tensor:
        """Return the product of all gates on each index of an axis."""
        factors = []
        for name, on_host in owners.items():
            owner = on_host.to(self.values[name].device)
            value = self.values[name][owner.clamp_min(0)]
            factors.append(torch.where(owner < 0, torch.ones_like(value), value))
        return torch.stack(factors).prod(0) if len(factors) > 1 else factors[0]


class _Scaled(torch.autograd.Function):
    """``source * factor``, which keeps for its backward only what the consumer keeps anyway: the result.

    A factor of zero gets a gradient of zero: what it took away is not kept.
    """

    @staticmethod
    def forward(source: Tensor, factor: Tensor) -> Tensor:
        return source * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gated, factor = ctx.saved_tensors
        to_source = to_factor = None
        if ctx.needs_input_grad[0]:
            to_source = gradient * factor
        if ctx.needs_input_grad[1]:
            summed = (gradient * gated).sum_to_size(factor.shape)
            to_factor = torch.where(factor == 0, torch.zeros_like(summed), summed / factor)
        return to_source, to_factor


def _consumers(groups: NodeGroups, gated: Mapping[str, NodeGroup]) -> tuple[Consumer, ...]:
    owners: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, group in gated.items():
        if not group.consumers:
            raise TrainingError(
                f"no operator consumes the units of '{name}', so they have no contribution to gate",
                "leave this kind out of kinds (recipe: prune.kinds)",
            )
        for member in group.consumers:
            owner = torch.from_numpy(group.owner(member))
            owners.setdefault((member.parameter, member.axis), {})[name] = owner
    places, normed = _places(groups), normed_weights(groups.graph)
    for parameter, _ in owners:
        if parameter in normed:
            raise TrainingError(
                f"{parameter} is rescaled by a norm of itself ({normed[parameter]}), which removing units changes and "
                "closing their gates does not",
                "attach plain LoRA adapters there instead of DoRA, or leave this kind out of kinds "
                "(recipe: prune.kinds)",
            )
    return tuple(
        Consumer(parameter, axis, *places[parameter], owner) for (parameter, axis), owner in owners.items()
    )


def _places(groups: NodeGroups) -> dict[str, tuple[str, int]]:
    """Return, for each weight, the activation that its operator reads and the dimension that is contracted."""
    places: dict[str, tuple[str, int]] = {}
    for operator in groups.graph.operators:
        activations = [value.name for value in operator.inputs if not value.is_weight]
        for value in operator.inputs:
            if value.is_weight and activations:
                places[value.name] = (activations[0], 1 if operator.target.startswith("aten.conv") else -1)
    return places
