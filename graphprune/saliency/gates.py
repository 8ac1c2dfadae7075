"""Gates: one scalar for each unit, on its whole contribution.

A unit's contribution is what its consumers read: the activations that go into `down_proj` for a channel, into
`o_proj` for a head. Scaling them scales the contribution linearly and leaves every weight alone, so that a gate of
zero is the unit removed, a gate of one the model as it was, and the gradient with respect to the gate what the unit
is worth. Works on a quantized base too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import Member, NodeGroup, NodeGroups
from graphprune.errors import TrainingError


class Gates:
    """Gates on the units of some groups, held by hooks on the modules that consume them.

    Args:
        model: The model; `close` takes the hooks off again.
        groups: Its node groups.
        names: Groups to gate.

    Attributes:
        values: One float32 parameter (units,) for each group, ones at first.
    """

    def __init__(self, model: nn.Module, groups: NodeGroups, names: Iterable[str]) -> None:
        device = next(model.parameters()).device
        self.groups: dict[str, NodeGroup] = {name: groups[name] for name in names}
        self.values = {
            name: nn.Parameter(torch.ones(group.size, device=device)) for name, group in self.groups.items()
        }
        self._open = False
        self._handles: list[Any] = []
        for parameter, owners in _owners(groups, self.groups).items():
            module = model.get_submodule(parameter.rpartition(".")[0])
            dim = _input_dim(groups, parameter)
            self._handles.append(module.register_forward_pre_hook(self._hook(parameter, owners, dim)))

    def close(self) -> None:
        """Take the gates off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

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

    def gradients(self) -> dict[str, Tensor]:
        """Return the gates' gradients, and clear them.

        Raises:
            TrainingError: If a gate has none: the module that owns a consumer's weight is not called.
        """
        found = {}
        for name, value in self.values.items():
            if value.grad is None:
                raise TrainingError(
                    f"the units of '{name}' cannot be gated: no module that reads them is called",
                    "leave this kind out of prune.kinds",
                )
            found[name] = value.grad
            value.grad = None
        return found

    def _hook(self, parameter: str, owners: Mapping[str, Tensor], dim: int) -> Any:
        def scale(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._open:
                return None
            source, *rest = arguments
            factor = self._factor(owners, source)
            if source.shape[dim] != factor.numel():
                raise TrainingError(
                    f"the module that owns {parameter} reads an input of shape {tuple(source.shape)}, "
                    f"and {factor.numel()} gates do not fit its axis {dim}",
                    "leave this kind out of prune.kinds",
                )
            shape = [1] * source.dim()
            shape[dim] = -1
            return (source * factor.view(shape).to(source.dtype), *rest)

        return scale

    def _factor(self, owners: Mapping[str, Tensor], source: Tensor) -> Tensor:
        factor: Tensor | None = None
        for name, owner in owners.items():
            value = self.values[name][owner.clamp_min(0)]
            value = torch.where(owner < 0, torch.ones_like(value), value)
            factor = value if factor is None else factor * value
        return torch.ones((), device=source.device) if factor is None else factor


def _owners(groups: NodeGroups, gated: Mapping[str, NodeGroup]) -> dict[str, dict[str, Tensor]]:
    """Return, for each consuming parameter, which unit of each gated group owns each input index."""
    owners: dict[str, dict[str, Tensor]] = {}
    for name, group in gated.items():
        consumers: tuple[Member, ...] = group.consumers
        if not consumers:
            raise TrainingError(
                f"no operator consumes the units of '{name}', so they have no contribution to gate",
                "leave this kind out of prune.kinds",
            )
        for member in consumers:
            owners.setdefault(member.parameter, {})[name] = torch.from_numpy(groups.owner(group, member))
    return owners


def _input_dim(groups: NodeGroups, parameter: str) -> int:
    """Return which dimension of its module's input a consuming parameter is contracted with."""
    for operator in groups.graph.operators:
        if any(value.name == parameter for value in operator.inputs):
            return 1 if operator.target.startswith("aten.conv") else -1
    return -1
