"""Caches and other objects that a model returns beside its tensors: a trace does without them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float, str, type(None))


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let a model neither fill nor return a cache, unless it is told to.

    A forward that names ``use_cache`` and was not told gets False. Of what the model returns, objects that are neither
    tensors nor containers of them are left out.

    Args:
        model: Changed by hooks alone, which are gone afterwards.
    """
    hooks = [
        module.register_forward_pre_hook(_no_cache, with_kwargs=True)
        for module in model.modules()
        if "use_cache" in inspect.signature(module.forward).parameters
    ]
    hooks.append(model.register_forward_hook(_plain))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _no_cache(
    module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = inspect.signature(module.forward).bind_partial(*positional, **named).arguments
    if "use_cache" not in given or ("use_cache" in named and named["use_cache"] is None):
        named = {**named, "use_cache": False}
    return positional, named


def _plain(module: nn.Module, positional: Any, output: Any) -> Any:
    """Leave objects out, as long as a tensor is left."""
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(output, is_leaf=_is_object)):
        return output
    return tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else None, output, is_leaf=_is_object)


def _is_object(item: Any) -> bool:
    """Whether something is no container of results: a cache is none, even where torch is told how to flatten it."""
    return not isinstance(item, (tuple, list, Mapping)) and not is_dataclass(item)
