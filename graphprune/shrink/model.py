"""Surgery on a module: parameters and buffers sliced, sizes that torch's own layers record set anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.errors import ShrinkError
from graphprune.shrink.plan import Plan
from graphprune.shrink.program import Program
from graphprune.shrink.resize import resize
from graphprune.shrink.weights import select_weight

# Relative to the largest output; the graph and the module add up in different orders.
TOLERANCE = 1e-4


def shrink(model: nn.Module, groups: NodeGroups, plan: Plan, example_inputs: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a model without the units that a plan removes.

    The copy is checked against the shrunk graph, which is exact by construction.

    Args:
        model: The model that `groups` were read off; it is not changed.
        groups: Its node groups.
        plan: Which units to remove.
        example_inputs: Keyword arguments of its forward, as given to `trace`.

    Returns:
        The smaller model: tied parameters stay tied, dtypes, devices and gradient flags stay as they were.

    Raises:
        ShrinkError: If the plan does not fit, or the model's own code does not run on the smaller weights.
    """
    plan.check(groups)
    kept = plan.kept(groups)
    small = copy.deepcopy(model)
    _slice_weights(small, groups, kept)
    _record_sizes(small)
    _check(small, model, groups, kept, example_inputs)
    return small


def _slice_weights(model: nn.Module, groups: NodeGroups, kept: Mapping[str, Indices]) -> None:
    replaced: dict[int, Any] = {}
    for module_name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    full_name = f"{module_name}.{name}" if module_name else name
                    replaced[id(tensor)] = (tensor, _sliced(full_name, tensor, groups, kept))
                store[name] = replaced[id(tensor)][1]


def _sliced(name: str, tensor: Tensor, groups: NodeGroups, kept: Mapping[str, Indices]) -> Tensor:
    smaller = select_weight(name, tensor.detach(), groups, kept)
    if smaller.shape == tensor.shape:
        return tensor
    smaller = smaller.contiguous()
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def _record_sizes(model: nn.Module) -> None:
    """Set the sizes that torch's own layers record beside their weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.num_features = module.running_mean.shape[0]
        elif isinstance(module, nn.modules.conv._ConvNd):
            module.out_channels = module.weight.shape[0]
            if module.groups == module.in_channels > 1:
                module.groups = module.weight.shape[0]
            module.in_channels = module.weight.shape[1] * module.groups


def _check(
    small: nn.Module,
    model: nn.Module,
    groups: NodeGroups,
    kept: Mapping[str, Indices],
    example_inputs: Mapping[str, Any],
) -> None:
    """Run the smaller module and the shrunk graph side by side."""
    was_training = small.training
    small.eval()
    try:
        with torch.no_grad():
            ours = _first_tensor(small(**example_inputs))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ShrinkError(
            f"{type(model).__name__}'s own code does not run on the smaller weights: {first}",
            "prune other kinds of groups; the traced graph of this model can still be shrunk",
        ) from error
    finally:
        small.train(was_training)
    weights = {
        name: select_weight(name, tensor.detach(), groups, kept)
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    expected = resize(Program(groups.graph.program), groups, kept)(weights, example_inputs)[0]
    distance = float((ours - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not distance <= TOLERANCE:
        raise ShrinkError(
            f"{type(model).__name__} computes something else on the smaller weights: its outputs are off by "
            f"{distance:.1e} of their size (allowed {TOLERANCE:.0e})",
            "prune other kinds of groups; a norm over a pruned axis, for one, divides by its width",
        )


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))
