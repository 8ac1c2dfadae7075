"""The table of rules by operator name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.errors import CouplingError
from graphprune.trace.graph import Operator

Rule = Callable[[Operator, Algebra], "Axes | tuple[Axes, ...]"]

_RULES: dict[str, Rule] = {}
_FAMILIES = ("attention", "contraction", "elementwise", "factory", "lookup", "reduction", "reshaping")
ENTRY_POINTS = "graphprune.rules"


def rule(*targets: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operators named `targets`.

    Raises:
        CouplingError: If one of them has a rule already.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise CouplingError(
                    f"operator {target} already has a rule, {_RULES[target].__module__}.{_RULES[target].__name__}",
                    "remove one of the two registrations",
                )
            _RULES[target] = function
        return function

    return register


def rule_for(target: str) -> Rule | None:
    """Return the rule of an operator, or None if it is opaque."""
    _load()
    return _RULES.get(target)


@cache
def _load() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"graphprune.coupling.rules.{family}")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
