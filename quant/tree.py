"""Putting one module in the place of another in a module tree."""

from __future__ import annotations

from torch import nn


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered below `model`; a module may be registered at several names."""
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
