"""Where gated units are consumed: the weights that read them, and what gates can act on there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.coupling.groups import NodeGroup, NodeGroups
from graphprune.errors import TrainingError
from graphprune.saliency.norms import normed_weights
from graphprune.trace.graph import Operator, OperatorGraph, Value


@dataclass(frozen=True, slots=True)
class Consumer:
    """A weight that reads gated activations.

    Attributes:
        parameter: Its qualified name.
        axis: The weight's axis that is contracted.
        module: Qualified name of the module that multiplies by it: mostly the owner, of a tied weight the output head,
            "" for the model itself.
        source: Name of the activation that it reads; consumers of one activation share it.
        dim: The activation's axis that is contracted, as a dimension of the module's input; None where the module
            works the activation out itself, as the experts of a mixture do.
        owners: For each gated group, the unit that owns each index of the axis, or -1.
    """

    parameter: str
    axis: int
    module: str
    source: str
    dim: int | None
    owners: Mapping[str, Tensor]

    def factor(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the product of all gates on each index of the axis.

        Args:
            values: Gates (units,), by group.
        """
        factors = []
        for name, on_host in self.owners.items():
            owner = on_host.to(values[name].device)
            value = values[name][owner.clamp_min(0)]
            factors.append(torch.where(owner < 0, torch.ones_like(value), value))
        return torch.stack(factors).prod(0) if len(factors) > 1 else factors[0]


def consumers_of(groups: NodeGroups, gated: Iterable[NodeGroup]) -> tuple[Consumer, ...]:
    """Return all weights that read units of some groups.

    Raises:
        TrainingError: If the units of a group are read by none, or closing their gates would not be removing them.
    """
    owners: dict[tuple[str, int], dict[str, Tensor]] = {}
    for group in gated:
        if not group.consumers:
            raise TrainingError(
                f"no operator consumes the units of '{group.name}', so they have no contribution to gate",
                "leave this kind out of kinds (recipe: prune.kinds)",
            )
        if group.kind == "hidden":
            raise TrainingError(
                f"a norm counts the units of '{group.name}' whether what reads them is gated or not",
                "leave hidden out of kinds (recipe: prune.kinds)",
            )
        for member in group.consumers:
            owner = torch.from_numpy(group.owner(member))
            owners.setdefault((member.parameter, member.axis), {})[group.name] = owner
    _check_norms(groups.graph, (parameter for parameter, _ in owners))
    products = _products(groups.graph)
    producers = {
        value.name: operator for operator in groups.graph.operators for value in operator.outputs if value
    }
    looked_up = {
        value.name
        for operator in groups.graph.operators
        if operator.target.startswith(_LOOKUP)
        for value in operator.inputs
    }
    found = []
    for (parameter, axis), gates in owners.items():
        if parameter not in products:
            raise TrainingError(
                f"no operator multiplies {parameter} with an activation, so its units cannot be gated",
                "leave this kind out of kinds (recipe: prune.kinds)",
            )
        operator, activation, dim = products[parameter]
        module = operator.module
        given = _module_input(activation, module, producers)
        if given is None and parameter in looked_up:
            raise TrainingError(
                f"{parameter} is looked up and multiplied by, and '{module}' works out what it is multiplied with, so "
                "its units cannot be gated in one place alone",
                "leave this kind out of kinds (recipe: prune.kinds)",
            )
        source = activation if given is None else given
        found.append(Consumer(parameter, axis, module, source.name, None if given is None else dim, gates))
    return tuple(found)


def _check_norms(graph: OperatorGraph, parameters: Iterable[str]) -> None:
    normed = normed_weights(graph)
    for parameter in parameters:
        if parameter in normed:
            raise TrainingError(
                f"{parameter} is rescaled by a norm of itself ({normed[parameter]}), which removing units changes and "
                "closing their gates does not",
                "attach plain LoRA adapters there instead of DoRA, or leave this kind out of kinds "
                "(recipe: prune.kinds)",
            )


def _products(graph: OperatorGraph) -> dict[str, tuple[Operator, Value, int]]:
    """Return, for each weight, where it meets an activation, which one, and the dimension that is contracted.

    A weight may be transposed, cut or cast before that. An embedding's rows are activations themselves.
    """
    origins = {name: frozenset({name}) for name in graph.weights}
    found: dict[str, tuple[Operator, Value, int]] = {}
    for operator in graph.operators:
        weights = [origins[value.name] for value in operator.inputs if value.name in origins]
        every = frozenset[str]().union(*weights)
        others = [value for value in operator.inputs if value.name not in origins]
        activations = [value for value in others if "int" not in value.dtype]
        if activations:
            dim = 1 if operator.target.startswith("aten.conv") else -1
            found.update({name: (operator, activations[0], dim) for name in every if name not in found})
        elif every and not operator.target.startswith(_LOOKUP):
            origins.update({value.name: every for value in operator.outputs if value})
    return found


def _module_input(activation: Value, module: str, producers: Mapping[str, Operator]) -> Value | None:
    """Return what a module is called with if an activation is that, reshaped or cast at most along its other axes."""
    while module:
        operator = producers.get(activation.name)
        if operator is None or not f"{operator.module}.".startswith(f"{module}."):
            return activation
        before = operator.inputs[0] if len(operator.inputs) == 1 else None
        if before is None or operator.target.split(".")[1] not in _SAME_NUMBERS:
            return None
        if before.shape[-1:] != activation.shape[-1:]:
            return None
        activation = before
    return None


_LOOKUP = "aten.embedding"
_SAME_NUMBERS = {
    "view",
    "reshape",
    "_unsafe_view",
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "flatten",
    "unsqueeze",
}
