"""The table of saliencies: each scores every unit, larger meaning keep."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import RecipeError
from graphprune.saliency.gates import Gates


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a saliency may look at.

    Attributes:
        model: The gated model, which is judged as its gates are.
        groups: Its node groups.
        gates: Gates on the groups to score.
        batches: What `loss` takes, such as token ids (batch, window), already limited to the calibration set.
        loss: From a batch to the scalar that the model is judged by.
        seed: Of what is drawn at random.
    """

    model: nn.Module
    groups: NodeGroups
    gates: Gates
    batches: Iterable[Any]
    loss: Callable[[Any], Tensor]
    seed: int = 0


Saliency = Callable[[Evidence], dict[str, Tensor]]

_SALIENCIES: dict[str, Saliency] = {}
_OF_LOSS: set[str] = set()
_BUILT_IN = (
    *("cosine", "fisher", "flap", "loraprune", "magnitude", "random", "surgeon", "taylor", "wanda"),
    "weight_taylor",
)
"""Modules that register saliencies."""


def saliency(name: str, *, of_loss: bool = False) -> Callable[[Saliency], Saliency]:
    """Register a function as a saliency, which returns scores (units,) by group.

    Args:
        name: What recipes call it.
        of_loss: Whether a score tells by how much the loss changes without the unit, whatever kind of unit it is.
            Other scores are on a scale of their own for each kind of group.
    """

    def register(function: Saliency) -> Saliency:
        _SALIENCIES[name] = function
        if of_loss:
            _OF_LOSS.add(name)
        return function

    return register


def saliency_named(name: str) -> Saliency:
    """Return a registered saliency.

    Raises:
        RecipeError: If there is none of that name.
    """
    _load()
    if name not in _SALIENCIES:
        raise RecipeError.unknown("saliency", name, _SALIENCIES)
    return _SALIENCIES[name]


def kinds_compare(name: str) -> bool:
    """Return whether a saliency's scores of different kinds of groups are on one scale."""
    _load()
    return name in _OF_LOSS


def registered_saliencies() -> tuple[str, ...]:
    """Return the names of all saliencies, in alphabetical order."""
    _load()
    return tuple(sorted(_SALIENCIES))


@cache
def _load() -> None:
    for name in _BUILT_IN:
        importlib.import_module(f"graphprune.saliency.{name}")
