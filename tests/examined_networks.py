"""Generated networks with what the engine says of them, and units as plain sets of slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from brute_force_rows import Slice
from generated_networks import Network, build, inputs_of
from hypothesis import HealthCheck, given, seed, settings
from network_strategies import networks
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.coupling.node_group import Member, NodeGroup
from graphprune.trace.model import trace

Units = dict[frozenset[Slice], str]


@dataclass(frozen=True)
class Examined:
    """A network's module, its inputs, and its node groups."""

    network: Network
    model: nn.Module
    inputs: dict[str, Tensor]
    groups: NodeGroups

    @property
    def prunable(self) -> list[NodeGroup]:
        return [group for group in self.groups.values() if group.prunable]

    @property
    def movable(self) -> list[NodeGroup]:
        return [group for group in self.groups.values() if group.permutable]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers under all their names."""
        named = (self.model.named_parameters, self.model.named_buffers)
        return {name: tensor.detach() for of in named for name, tensor in of(remove_duplicate=False)}

    @property
    def weights_by_identity(self) -> dict[str, Tensor]:
        """The same, a tied one the same object under each name."""
        named = (self.model.named_parameters, self.model.named_buffers)
        return {name: tensor for of in named for name, tensor in of(remove_duplicate=False)}

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.network.seed)


@lru_cache(maxsize=512)
def examine(network: Network) -> Examined:
    """Trace a network, once for all properties."""
    model, inputs = build(network), inputs_of(network)
    return Examined(network, model, inputs, node_groups(trace(model, inputs, dynamic=False)))


def over_networks(share: int = 1) -> Callable[[Callable[[Network], None]], Callable[[], None]]:
    """State a property of generated networks.

    They are the same ones for every property, so that each is traced once.

    Args:
        share: One of how many of the profile's examples to take, for what only shows that mistakes are found, or takes
            a second a network.
    """
    lenient = settings(
        max_examples=max(1, settings.default.max_examples // share),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    return lambda property_of: seed(20)(lenient(given(networks())(property_of)))


def units_of(groups: NodeGroups, chosen: Callable[[NodeGroup], bool]) -> Units:
    """Return the units of `chosen` groups as sets of slices of parameters, each with its group's name."""
    found: Units = {}
    for group in filter(chosen, groups.values()):
        for unit in range(group.size):
            slices = frozenset(
                (member.parameter, member.axis, int(index))
                for member in group.members
                if member.role == "parameter"
                for index in group.indices(member, unit)
            )
            if slices:
                found[slices] = group.name
    return found


def run(examined: Examined, weights: Mapping[str, Tensor]) -> Tensor:
    """Run a network's own module on other weights of the same shapes."""
    with torch.no_grad():
        return torch.func.functional_call(
            examined.model, dict(weights), (), dict(examined.inputs), tie_weights=False
        )


def change(
    examined: Examined,
    groups: list[NodeGroup],
    changed: Callable[[NodeGroup, Member, Tensor, Any], Tensor],
) -> dict[str, Tensor]:
    """Apply `changed` to all members of `groups`, with the owners of the member's indices."""
    weights = examined.weights
    tied = examined.groups.graph.tied
    for group in groups:
        for member in group.members:
            owner = group.owner(member)
            for name in weights:
                if tied.get(name, name) == member.parameter:
                    weights[name] = changed(group, member, weights[name], owner)
    return weights


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
