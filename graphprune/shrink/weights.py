"""Selections applied to tensors: slicing and zeroing along every axis that a group reaches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices


def select_weight(name: str, tensor: Tensor, groups: NodeGroups, kept: Mapping[str, Indices]) -> Tensor:
    """Return a weight with only the kept units, in their new order; the tensor itself if nothing changes.

    Args:
        name: Qualified name, tied ones included.
        tensor: The weight.
        groups: The node groups.
        kept: Units that stay, in their new order, by group name.
    """
    for axis, indices in _changed_axes(name, groups, kept).items():
        tensor = tensor.index_select(axis, torch.as_tensor(indices, device=tensor.device))
    return tensor


def zero_weight(name: str, tensor: Tensor, groups: NodeGroups, kept: Mapping[str, Indices]) -> Tensor:
    """Return a weight in which everything that belongs to a removed unit is zero."""
    for axis, indices in _changed_axes(name, groups, kept).items():
        gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
        gone[torch.as_tensor(indices)] = False
        tensor = tensor.index_fill(axis, torch.nonzero(gone).flatten().to(tensor.device), 0)
    return tensor


def _changed_axes(name: str, groups: NodeGroups, kept: Mapping[str, Indices]) -> dict[int, Indices]:
    axes = groups.axes(groups.graph.tied.get(name, name))
    if axes is None:
        return {}
    selection = groups.selection(kept)
    touched = [
        axis
        for axis, layout in enumerate(axes)
        if any(atom.identity in selection for atom in groups.atoms(layout))
    ]
    return {axis: groups.keep(axes[axis], selection) for axis in touched}
