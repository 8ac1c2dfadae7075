"""Gates: one scalar for each unit, on its whole contribution.

A unit's contribution is what its consumers read: the activations that go into `down_proj` for a channel, into
`o_proj` for a head. Scaling them scales the contribution linearly and leaves every weight alone, so that a gate of
zero is the unit removed, a gate of one the model as it was, and the gradient with respect to the gate what the unit
is worth. Works on packed linear layers too. Where activations are worked out within the module that multiplies by the
weight, as in the experts of a mixture, the weight is scaled instead while the module runs, which is the same product.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.node_group import NodeGroup
from graphprune.errors import TrainingError
from graphprune.saliency.consumers import Consumer, consumers_of
from graphprune.shrink.gated import GateHook

StandIn = Callable[[Tensor], Tensor]
"""From an activation (…, axis) to what takes the place of its gated share, of the same shape."""


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
        self.consumers = tuple(
            consumer if _takes_one(model.get_submodule(consumer.module)) else replace(consumer, dim=None)
            for consumer in consumers_of(groups, self.groups.values())
        )
        self.stand_ins: dict[str, StandIn] = {}
        self._open = False
        # Consumers of one activation (a layer and its adapter) share its gated form, which is made once a pass.
        self._made: dict[str, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        held: set[tuple[str, str]] = set()
        for consumer in self.consumers:
            module = model.get_submodule(consumer.module)
            if consumer.dim is None:
                owner = model.get_submodule(consumer.parameter.rpartition(".")[0])
                weight = _ScaledWeight(self, consumer, owner)
                self._handles.append(module.register_forward_pre_hook(GateHook(weight.begin)))
                self._handles.append(module.register_forward_hook(weight.end, always_call=True))
            elif (consumer.module, consumer.source) not in held:
                # Two weights of a module may read one input, which is gated once.
                held.add((consumer.module, consumer.source))
                self._handles.append(module.register_forward_pre_hook(self._on_input(consumer, consumer.dim)))

    def close(self) -> None:
        """Take the gates off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._made.clear()

    @property
    def is_open(self) -> bool:
        """Whether every gate counts as one now."""
        return self._open

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
            TrainingError: If a gate has none: the module that owns a consumer's weight is not called, or no
                gradient has come to any gate.
        """
        self.release()
        if self.values and all(value.grad is None for value in self.values.values()):
            raise TrainingError(
                "no gradient has come to the gates of any unit",
                "call backward() before this, on outputs that were computed outside gates.opened() and before "
                "close(); where that is so, nothing calls the modules that read the units: choose other kinds "
                "(recipe: prune.kinds)",
            )
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

    def _on_input(self, consumer: Consumer, dim: int) -> GateHook:
        def scale(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._open:
                return None
            if not arguments:
                raise TrainingError(
                    f"'{consumer.module}' is called with keywords alone, and its input cannot be gated",
                    "call it with its input first, or leave this kind out of kinds (recipe: prune.kinds)",
                )
            source, *rest = arguments
            made = self._made.get(consumer.source)
            if made is None or made[0]() is not source:
                made = self._made[consumer.source] = (weakref.ref(source), self._gated(consumer, dim, source))
            return (made[1], *rest)

        return GateHook(scale)

    def _gated(self, consumer: Consumer, dim: int, source: Tensor) -> Tensor:
        factor = consumer.factor(self.values)
        if source.shape[dim] != factor.numel():
            raise TrainingError(
                f"the module that owns {consumer.parameter} reads an input of shape {tuple(source.shape)}, "
                f"and {factor.numel()} gates do not fit its axis {dim}",
                "leave this kind out of kinds (recipe: prune.kinds)",
            )
        shape = [1] * source.dim()
        shape[dim] = -1
        factor = factor.view(shape).to(source.dtype)
        stand_in = self.stand_ins.get(consumer.source)
        if stand_in is not None:
            return source * factor + (1 - factor) * stand_in(source)
        gated: Tensor = _Scaled.apply(source, factor)
        return gated


def _takes_one(module: nn.Module) -> bool:
    """Whether a module is called with one activation; which of several its weight reads, a hook cannot tell."""
    given = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return len(given) == 1


class _ScaledWeight:
    """A weight that is scaled along its contracted axis while the module that multiplies by it runs."""

    def __init__(self, gates: Gates, consumer: Consumer, owner: nn.Module) -> None:
        self._gates = gates
        self._owner = owner
        self._consumer = consumer
        self._name = consumer.parameter.rpartition(".")[2]
        self._whole: list[nn.Parameter] = []

    def begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Put the scaled weight in the parameter's place."""
        weight = self._owner._parameters.get(self._name)
        if weight is None:
            raise TrainingError(
                f"{self._consumer.parameter} is no parameter of its module any more, so its units cannot be gated",
                "prune before quantizing, or leave this kind out of kinds (recipe: prune.kinds)",
            )
        self._whole.append(weight)
        if not self._gates.is_open:
            shape = [1] * weight.dim()
            shape[self._consumer.axis] = -1
            factor = self._consumer.factor(self._gates.values).view(shape)
            # Not a parameter of its own, but what a forward reads in the parameter's place.
            self._owner._parameters[self._name] = cast(nn.Parameter, weight * factor.to(weight.dtype))

    def end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Put the parameter back."""
        if self._whole:
            self._owner._parameters[self._name] = self._whole.pop()


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
