"""Whether gates stand on a model: hooks scale what its modules read then, which no tracing or surgery sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class GateHook:
    """A forward pre-hook by which a gate acts; being of this class is what tells it from other hooks."""

    scale: Callable[[nn.Module, Arguments], Arguments | None]

    def __call__(self, module: nn.Module, arguments: Arguments) -> Arguments | None:
        """Return what the module is to read instead."""
        return self.scale(module, arguments)


def is_gated(model: nn.Module) -> bool:
    """Whether gates stand on a model."""
    return any(
        isinstance(hook, GateHook)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )
