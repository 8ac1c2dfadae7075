"""Biases that the original model does not have, in a configuration that lets the stock class build them.

Which field of a configuration gives which layers a bias is not looked up by the model's class: a field that is false,
and with which as true the class builds nothing but further biases, is one. A class may know biases only for several
layers together; the others get zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from graphprune.errors import ShrinkError


def allow_biases(config: Any, model: nn.Module) -> Any:
    """Return a configuration with which the stock class has a place for every bias of a model.

    Args:
        config: The original model's; not changed.
        model: The smaller model, adapters merged. Biases that come with those that it has are added to it, as zeros.

    Raises:
        ShrinkError: If the stock class has no place for one of its biases.
    """
    names = set(model.state_dict())
    changed = config_with_biases(type(model), config, names)
    for name in _names(type(model), changed) - names:
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        size = layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.weight.shape[-1]
        layer.bias = nn.Parameter(layer.weight.new_zeros(size), requires_grad=layer.weight.requires_grad)
    return changed


def config_with_biases(kind: Any, config: Any, wanted: Collection[str]) -> Any:
    """Return a configuration with which a stock class builds biases.

    Args:
        kind: The class.
        config: Its configuration; not changed.
        wanted: Names that the built model's state must have, the biases among them.

    Raises:
        ShrinkError: If it has no place for one of them.
    """
    plain = _names(kind, config)
    changed = copy.deepcopy(config)
    missing = set(wanted) - plain
    refused: dict[str, ShrinkError] = {}
    for field in _switches(config) if missing else ():
        try:
            further = _names(kind, config, field) - plain
        except ShrinkError as error:  # no switch of biases, then; told below if none is found
            refused[field] = error
            continue
        if further & missing and all(name.endswith(".bias") for name in further):
            setattr(changed, field, True)
    left = sorted(set(wanted) - _names(kind, changed))
    if left:
        without = f" (it cannot be built with {', '.join(refused)})" if refused else ""
        raise ShrinkError(
            f"{kind.__name__} has no place for {left[0]}{f' and {len(left) - 1} more' if len(left) > 1 else ''}: no "
            f"switch of {type(config).__name__} gives that layer a bias{without}",
            "repair by least squares, which changes no shape (recipe: prune.repair)",
        )
    return changed


def _switches(config: Any) -> list[str]:
    """Return the fields of this kind of configuration that are off; what every configuration has shapes nothing."""
    common = PretrainedConfig().to_dict()
    return [
        field
        for field, value in config.to_dict().items()
        if value is False and field not in common and hasattr(config, field)
    ]


def _names(kind: Any, config: Any, *switches: str) -> set[str]:
    """Return the names of what a class builds with some switches on.

    Raises:
        ShrinkError: If it cannot be built so.
    """
    switched = copy.deepcopy(config)
    try:
        for field in switches:
            setattr(switched, field, True)
        with torch.device("meta"):
            return set(kind(switched).state_dict())
    except Exception as error:  # a class says in its own way that a configuration is none
        how = f" with {', '.join(switches)}" if switches else ""
        raise ShrinkError(
            f"{kind.__name__} cannot be built{how} from its configuration: {error}",
            "repair by least squares, which changes no shape (recipe: prune.repair)",
        ) from error
