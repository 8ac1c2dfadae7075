"""Selections applied to tensors: slicing and zeroing along every axis that a group reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout, atoms_of
from graphprune.coupling.selection import Indices


def named_weights(model: nn.Module | ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by every qualified name that they have."""
    if isinstance(model, ExportedProgram):
        yield from model.state_dict.items()
        named = ((name, item) for name, item in model.constants.items() if isinstance(item, Tensor))
        yield from ((name, item) for name, item in named if name not in model.state_dict)
    else:
        yield from model.named_parameters(remove_duplicate=False)
        yield from model.named_buffers(remove_duplicate=False)


def select_weight(name: str, tensor: Tensor, groups: NodeGroups, kept: Mapping[str, Indices]) -> Tensor:
    """Return a weight with only the kept units, in their new order; the tensor itself if nothing changes.

    Args:
        name: Qualified name, tied ones included.
        tensor: The weight.
        groups: The node groups.
        kept: Units that stay, in their new order, by group name.
    """
    for axis, indices in changed_axes(name, groups, kept).items():
        tensor = tensor.index_select(axis, torch.as_tensor(indices, device=tensor.device))
    return tensor


def zero_weight(
    name: str, tensor: Tensor, groups: NodeGroups, kept: Mapping[str, Indices], *, almost: float = 0.0
) -> Tensor:
    """Return a weight in which everything that belongs to a removed unit is zero, as the groups' members name it.

    Args:
        name: Qualified name, tied ones included.
        tensor: The weight.
        groups: The node groups.
        kept: Units that stay, by group name.
        almost: What to multiply with instead of zero, where a quotient of two zeros would be no number.
    """
    for axis, gone in removed_indices(name, groups, kept).items():
        places = torch.as_tensor(gone, device=tensor.device)
        rest = tensor.index_select(axis, places) * almost
        tensor = tensor.index_copy(axis, places, rest.to(tensor.dtype))
    return tensor


def agreed_selections(groups: NodeGroups, kept: Mapping[str, Indices]) -> dict[tuple[str, int], Indices]:
    """Return what to keep of each axis of a shared buffer that all its readers select alike.

    Rotary frequencies are read by all layers; where every layer keeps the same pairs, the buffer itself can be cut.
    """
    selection, wanted = groups.selection(kept), dict[tuple[str, int], list[Indices]]()
    for group in groups.values():
        for member in group.members:
            if member.side == "selected":
                chosen = groups.keep(member.layout, selection)
                wanted.setdefault((member.parameter, member.axis), []).append(chosen)
    return {
        place: first
        for place, (first, *rest) in wanted.items()
        if len(first) < groups.graph.weights[place[0]].shape[place[1]]
        and all(len(first) == len(other) and bool((first == other).all()) for other in rest)
    }


def removed_indices(name: str, groups: NodeGroups, kept: Mapping[str, Indices]) -> dict[int, Indices]:
    """Return the indices that removed units own of each axis of a weight."""
    canonical, gone = groups.graph.tied.get(name, name), dict[int, Indices]()
    for group_name, units in kept.items():
        group = groups[group_name]
        for member in group.members:
            if member.parameter == canonical and member.side != "selected":
                owner = group.owner(member)
                owned = np.flatnonzero((owner >= 0) & ~np.isin(owner, units))
                gone[member.axis] = np.union1d(gone.get(member.axis, owned), owned)
    return gone


def changed_axes(name: str, groups: NodeGroups, kept: Mapping[str, Indices]) -> dict[int, Indices]:
    """Return the indices that stay of each axis of a weight in which some group keeps or orders its units."""
    axes: list[Layout] = groups.axes(groups.graph.tied.get(name, name)) or []
    selection = groups.selection(kept)
    return {
        dim: groups.keep(axis, selection)
        for dim, axis in enumerate(axes)
        if any(atom.identity in selection for atom in atoms_of(axis))
    }
