"""One key head that is broadcast to all queries, said as grouping, which is how ONNX's Attention has it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn import functional

from graphprune.export.overridden import overridden

_ATTEND = functional.scaled_dot_product_attention


def grouped_heads() -> AbstractContextManager[None]:
    """While a model is traced, let attention group its queries where it would broadcast a single key head to them."""
    return overridden({_ATTEND: _grouped})


def _grouped(query: Tensor, key: Tensor, *others: Any, **settings: Any) -> Tensor:
    if query.dim() == key.dim() == 4 and key.shape[1] == 1 != query.shape[1]:
        settings["enable_gqa"] = True
    return _ATTEND(query, key, *others, **settings)
