"""Surgery on a module: parameters and buffers sliced, the sizes that layers and modules record set anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.errors import ShrinkError, TraceError
from graphprune.shrink.attributes import choices, set_attributes
from graphprune.shrink.norms import compensate_norms
from graphprune.shrink.weights import agreed_selections, select_weight
from graphprune.trace.fx import trace_module
from graphprune.trace.graph import Value

# Relative to the largest output; the graph and the module add up in different orders.
TOLERANCE = 1e-4


def shrink_module(
    model: nn.Module,
    groups: NodeGroups,
    kept: Mapping[str, Indices],
    inputs: Mapping[str, Any],
    expected: Tensor,
) -> nn.Module:
    """Return a sliced copy of a module that computes what the shrunk graph does.

    Args:
        model: The module; it is not changed.
        groups: Its node groups.
        kept: Units that stay, by group name.
        inputs: Keyword arguments of its forward.
        expected: What the shrunk graph returns for them.

    Raises:
        ShrinkError: If the module's own code does not follow, with what it said.
    """
    small = copy.deepcopy(model)
    _slice_weights(small, groups, kept)
    _record_sizes(small, _convolution_groups(groups, kept))
    compensate_norms(small, groups, kept)
    problem = ""
    for choice in choices(model, groups, kept):
        before = set_attributes(small, choice)
        wrong = _difference(small, inputs, expected)
        if wrong is None:
            return small
        problem = problem or wrong
        set_attributes(small, before)
    raise ShrinkError(
        f"{type(model).__name__}'s own code does not follow its smaller weights: {problem}",
        "take the traced graph, shrink(..., form='graph'), or prune other kinds of groups",
    )


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


def _difference(module: nn.Module, inputs: Mapping[str, Any], expected: Tensor) -> str | None:
    """Run a module; return what is wrong with it, or None."""
    if expected.is_meta:
        return _misfit(module, inputs, expected)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            ours = first_tensor(module(**inputs))
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        module.train(was_training)
    if ours.shape != expected.shape:
        return f"its output has the shape {tuple(ours.shape)}, not {tuple(expected.shape)}"
    distance = float((ours - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if distance <= TOLERANCE:
        return None
    return f"its outputs are off by {distance:.1e} of their size (allowed {TOLERANCE:.0e})"


def _misfit(module: nn.Module, inputs: Mapping[str, Any], expected: Tensor) -> str | None:
    """Trace a module without weights: there are shapes to compare, and no numbers."""
    try:
        found = trace_module(module, inputs, dynamic=False).outputs[0].shape
    except TraceError as error:
        return error.problem
    return None if found == tuple(expected.shape) else f"its output has the shape {found}"


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of what a model returns."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))
