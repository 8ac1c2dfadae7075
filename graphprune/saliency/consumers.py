"""Where gated units are consumed: the weights that read them, and what gates can act on there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.node_group import NodeGroup
from graphprune.errors import TrainingError
from graphprune.saliency.norms import normed_weights
from graphprune.trace.graph import Operator, OperatorGraph, Value

_LOOKUP = "aten.embedding"
_SAME_NUMBERS = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "to",
        "_to_copy",
        "contiguous",
        "clone",
        "flatten",
        "unsqueeze",
        "detach",
    ]
)
_PARTS = frozenset(
    [
        "t",
        "transpose",
        "permute",
        "numpy_T",
        "mT",
        "select",
        "slice",
        "index",
        "index_select",
        "squeeze",
        "expand",
    ]
)


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
    return tuple(
        _consumer(parameter, axis, products.get(parameter, []), gates)
        for (parameter, axis), gates in owners.items()
    )


@dataclass(frozen=True, slots=True)
class _Product:
    """Where a weight meets an activation.

    Attributes:
        module: Which module multiplies.
        activation: Name of what the weight is multiplied with: of the module's input, if it is that.
        dim: The dimension of the module's input that is contracted; None where the activation is none of it.
    """

    module: str
    activation: str
    dim: int | None


def _consumer(parameter: str, axis: int, products: list[_Product], gates: Mapping[str, Tensor]) -> Consumer:
    modules = {product.module for product in products}
    within = any(product.dim is None for product in products)
    if len(modules) != 1 or (within and len(products) > 1):
        where = ", ".join(f"'{module}'" for module in sorted(modules)) or "none"
        raise TrainingError(
            f"{parameter} is multiplied with {len(products)} activations (in {where}), and its units are gated where "
            "there is one, or at the input of one module",
            "leave this kind out of kinds (recipe: prune.kinds)",
        )
    first = products[0]
    return Consumer(parameter, axis, first.module, first.activation, first.dim, gates)


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


def _products(graph: OperatorGraph) -> dict[str, list[_Product]]:
    """Return, for each weight, where it meets an activation; before that it may be cut, cast or laid out otherwise.

    Rows that are looked up in a table are activations themselves. A table that is looked up and also multiplied by
    within a forward of its own is left out: it could not be scaled in one place alone.
    """
    producers = {value.name: operator for operator in graph.operators for value in operator.outputs if value}
    origins = {name: name for name in graph.weights}
    found: dict[str, list[_Product]] = {}
    looked_up: set[str] = set()
    for operator in graph.operators:
        weights = [origins[value.name] for value in operator.inputs if value.name in origins]
        others = [
            value for value in operator.inputs if value.name not in origins and "int" not in value.dtype
        ]
        if operator.target.startswith(_LOOKUP):
            looked_up.update(weights)
        elif others:
            dim = 1 if operator.target.startswith("aten.conv") else -1
            given = _module_input(others[0], operator.module, producers)
            product = _Product(operator.module, (given or others[0]).name, None if given is None else dim)
            for name in weights:
                found.setdefault(name, []).append(product)
        elif len(weights) == 1 and _name(operator) in _SAME_NUMBERS | _PARTS:
            origins.update({value.name: weights[0] for value in operator.outputs if value})
    lost = {name for name in looked_up if any(product.dim is None for product in found.get(name, []))}
    return {name: products for name, products in found.items() if name not in lost}


def _module_input(activation: Value, module: str, producers: Mapping[str, Operator]) -> Value | None:
    """Return what a module is called with if an activation is that, reshaped or cast at most along its other axes."""
    while module:
        operator = producers.get(activation.name)
        if operator is None or not f"{operator.module}.".startswith(f"{module}."):
            return activation
        before = operator.inputs[0] if len(operator.inputs) == 1 else None
        if (
            before is None
            or _name(operator) not in _SAME_NUMBERS
            or before.shape[-1:] != activation.shape[-1:]
        ):
            return None
        activation = before
    return None


def _name(operator: Operator) -> str:
    return operator.target.split(".")[1]
