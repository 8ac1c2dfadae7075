"""A model's smaller shapes without its numbers: what surgery will leave, found out before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.shrink.module import cut_module
from graphprune.shrink.plan import Plan


def outline(model: nn.Module, groups: NodeGroups, removed_units: Mapping[str, int]) -> Any:
    """Return a copy on the meta device whose groups have lost so many units; which ones changes no shape.

    Sizes that modules keep in attributes of their own are those of the original still.

    Args:
        model: The model that `groups` were read off; it is not changed.
        groups: Its node groups.
        removed_units: How many units each group loses, by name.

    Raises:
        ShrinkError: If a group cannot lose so many.
    """
    plan = Plan({name: range(count) for name, count in removed_units.items()})
    plan.check(groups)
    # A tensor that the memo holds already is not copied.
    tensors = (*model.parameters(), *model.buffers())
    small = copy.deepcopy(model, {id(tensor): _without_numbers(tensor) for tensor in tensors})
    cut_module(small, groups, plan.kept(groups))
    return small


def _without_numbers(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
