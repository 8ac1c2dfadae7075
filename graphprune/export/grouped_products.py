"""Products of rows that are sorted by group with the matrix of their group, as mixtures of experts compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.integrations import moe  # noqa: F401 -- defines the operator that is looked up below

from graphprune.export.stand_ins import opaque

GROUPED = "GroupedMatMul"


@contextmanager
def opaque_grouped_products() -> Iterator[None]:
    """While a model is traced, let each grouped product be one opaque operator.

    Its inputs are rows (rows, in), matrices (groups, in, out), and for each group the number of rows up to its end.
    """
    with _Opaque():
        yield


class _Opaque(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        places = (
            (torch.ops.transformers, "grouped_mm_fallback"),
            (functional, "grouped_mm"),
            (torch, "_grouped_mm"),
        )
        self._grouped_products = [getattr(place, name) for place, name in places if hasattr(place, name)]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func not in self._grouped_products:
            return func(*args, **named)
        rows, matrices, ends = (*args, *named.values())[:3]
        return _grouped(rows, matrices, ends)


def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return opaque(GROUPED, (rows, matrices, ends), (rows.shape[0], matrices.shape[2]))
