"""An optimizer that goes on with the smaller model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import ShrinkError
from graphprune.shrink.fitting import fitting_plan
from graphprune.shrink.plan import Plan
from graphprune.shrink.weights import select_weight


def shrink_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    small: nn.Module,
    groups: NodeGroups,
    plan: Plan | Mapping[str, Sequence[int]],
) -> torch.optim.Optimizer:
    """Return an optimizer for the smaller model, its state (moments, for one) cut along.

    Args:
        optimizer: Of the original model; it is not changed.
        model: The original model.
        small: What `shrink` made of it by `plan`.
        groups: The node groups of the original.
        plan: Which units were removed.

    Raises:
        CouplingError: If the groups are of another model.
        ShrinkError: If the plan does not fit, or the optimizer holds a parameter that neither model has.
    """
    kept = fitting_plan(plan, model, groups).kept(groups)
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    smaller = dict(small.named_parameters(remove_duplicate=False))

    def replaced(parameter: Tensor) -> Any:
        name = names.get(id(parameter))
        if name not in smaller:
            raise ShrinkError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the smaller model lacks",
                "give the optimizer of the very model that was shrunk",
            )
        return smaller[name]

    def cut(parameter: Tensor, value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            return select_weight(names[id(parameter)], value, groups, kept).clone()
        return copy.deepcopy(value)

    twin = copy.copy(optimizer)
    twin.param_groups = [
        {**group, "params": [replaced(parameter) for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    twin.state = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        twin.state[replaced(parameter)] = {key: cut(parameter, value) for key, value in state.items()}
    return twin
