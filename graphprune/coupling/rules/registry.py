"""The table of rules by operator name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Literal, TypeVar

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.errors import CouplingError
from graphprune.trace.graph import Operator

Rule = Callable[[Operator, Algebra], "Axes | tuple[Axes, ...]"]
R = TypeVar("R", bound=Rule)
Vanishing = Literal["any", "all", "each", "first", "value", "affine", "zero", "never"]
"""When the result of an operator is zero along a unit: if any operand is (products), if all are (sums), if each
operand that has the unit is (concatenations), if the first or the one named ``value`` is, if a norm's own weight and
bias are, always, never."""

_FAMILIES = (
    "arrangement",
    "attention",
    "contraction",
    "convolution",
    "elementwise",
    "factory",
    "indexing",
    "normalisation",
    "reduction",
    "reshaping",
    "routing",
    "onnx_attention",
    "onnx_contraction",
    "onnx_elementwise",
    "onnx_indexing",
    "onnx_quantized",
    "onnx_reduction",
    "onnx_reshaping",
)
ENTRY_POINTS = "graphprune.rules"


@dataclass(frozen=True, slots=True)
class _Entry:
    rule: Rule
    vanishes: Vanishing
    moves: bool


_ENTRIES: dict[str, _Entry] = {}


def rule(*targets: str, vanishes: Vanishing = "never", moves: bool = False) -> Callable[[R], R]:
    """Register a function as the rule of the operators named `targets`.

    Args:
        targets: Names such as ``aten.mean.dim``, or ``aten.add`` for all overloads of it, in place or not, that
            have no rule of their own.
        vanishes: When the result is zero along a unit; a sum over an axis minds a unit that is not.
        moves: Whether the result holds the numbers of the first operand as they are, elsewhere at most.

    Raises:
        CouplingError: If one of them has a rule already.
    """

    def register(function: R) -> R:
        for target in targets:
            if target in _ENTRIES:
                other = _ENTRIES[target].rule
                raise CouplingError(
                    f"operator {target} already has a rule, {other.__module__}.{other.__name__}",
                    "remove one of the two registrations",
                )
            _entry.cache_clear()
            _ENTRIES[target] = _Entry(function, vanishes, moves)
        return function

    return register


def rule_for(target: str) -> Rule | None:
    """Return the rule of an operator, or None if it is opaque."""
    entry = _entry(target)
    return entry.rule if entry else None


def vanishing_of(target: str) -> Vanishing:
    """Return when an operator's result is zero along a unit."""
    entry = _entry(target)
    return entry.vanishes if entry else "never"


def moves_numbers(target: str) -> bool:
    """Return whether an operator's result holds the numbers of its first operand as they are."""
    entry = _entry(target)
    return entry is not None and entry.moves


@cache
def _entry(target: str) -> _Entry | None:
    _load()
    if target in _ENTRIES or not target.startswith("aten."):
        return _ENTRIES.get(target)
    base = target.rsplit(".", 1)[0]
    return _ENTRIES.get(base) or _ENTRIES.get(base.rstrip("_"))


@cache
def _load() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"graphprune.coupling.rules.{family}")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
