"""Surgery on a module: parameters and buffers sliced, the sizes that layers and modules record set anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.shrink.norms import compensate_norms
from graphprune.shrink.weights import agreed_selections, select_weight
from graphprune.trace.graph import Value


def cut_module(model: nn.Module, groups: NodeGroups, kept: Mapping[str, Indices]) -> None:
    """Give a module smaller weights, in place; the attributes that its own code reads stay as they are.

    Args:
        model: The module: a copy of the one that the groups were read off.
        groups: Its node groups.
        kept: Units that stay, by group name.

    Raises:
        ShrinkError: If a norm whose width shrinks is in no module that could make up for it.
    """
    _slice_weights(model, groups, kept)
    _record_sizes(model, _convolution_groups(groups, kept))
    compensate_norms(model, groups, kept)


def _slice_weights(model: nn.Module, groups: NodeGroups, kept: Mapping[str, Indices]) -> None:
    shared = agreed_selections(groups, kept)
    replaced: dict[int, Any] = {}
    for module_name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    full_name = f"{module_name}.{name}" if module_name else name
                    replaced[id(tensor)] = (tensor, _sliced(full_name, tensor, groups, kept, shared))
                store[name] = replaced[id(tensor)][1]


def _sliced(
    name: str,
    tensor: Tensor,
    groups: NodeGroups,
    kept: Mapping[str, Indices],
    shared: Mapping[tuple[str, int], Indices],
) -> Tensor:
    smaller = select_weight(name, tensor.detach(), groups, kept)
    for axis in range(tensor.dim()):
        if (name, axis) in shared:
            smaller = smaller.index_select(axis, torch.as_tensor(shared[name, axis], device=tensor.device))
    if smaller.shape == tensor.shape:
        return tensor
    smaller = smaller.contiguous()
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def _record_sizes(model: nn.Module, convolution_groups: Mapping[str, int]) -> None:
    """Set the sizes that torch's own layers record beside their weights."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = weight.shape
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = weight.shape[0]
        elif isinstance(module, nn.GroupNorm):
            module.num_groups = module.num_groups * weight.shape[0] // module.num_channels
            module.num_channels = weight.shape[0]
        elif isinstance(module, nn.modules.conv._ConvNd):
            _record_channels(module, weight, convolution_groups.get(path, 1))


def _record_channels(module: Any, weight: Tensor, count: int) -> None:
    module.groups = count
    sides = (weight.shape[0], weight.shape[1] * count)  # axis 1 holds the channels of one group
    module.in_channels, module.out_channels = sides if module.transposed else sides[::-1]


def _convolution_groups(groups: NodeGroups, kept: Mapping[str, Indices]) -> dict[str, int]:
    """Return how many groups each grouped convolution has left, by its module."""
    selection = groups.selection(kept)
    found: dict[str, int] = {}
    for operator in groups.graph.operators:
        if operator.target.startswith("aten.conv") and operator["groups"] != 1:
            weight: Value = operator["weight"]
            channels = operator.outputs[0] if "transpose" in operator.target else operator["input"]
            whole, of_group = groups.axes(channels.name) if channels else None, groups.axes(weight.name)
            if whole and of_group:
                count = len(groups.keep(whole[1 - len(weight.shape)], selection))
                found[operator.module] = count // len(groups.keep(of_group[1], selection))
    return found
