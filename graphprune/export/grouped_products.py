"""Products of rows that are sorted by group with the matrix of their group, as mixtures of experts compute them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations import moe  # noqa: F401 -- defines the operator that is looked up below

from graphprune.export.overridden import overridden
from graphprune.export.stand_ins import opaque

GROUPED = "GroupedMatMul"


def opaque_grouped_products() -> AbstractContextManager[None]:
    """While a model is traced, let each grouped product be one opaque operator.

    Its inputs are rows (rows, in), matrices (groups, in, out), and for each group the number of rows up to its end.
    """
    places = (
        (torch.ops.transformers, "grouped_mm_fallback"),
        (functional, "grouped_mm"),
        (torch, "_grouped_mm"),
    )
    return overridden(
        dict.fromkeys([getattr(place, name) for place, name in places if hasattr(place, name)], _grouped)
    )


def _grouped(*arguments: Any, **named: Any) -> Tensor:
    # The three functions name their operands differently.
    rows, matrices, ends = (*arguments, *named.values())[:3]
    return opaque(GROUPED, (rows, matrices, ends), (rows.shape[0], matrices.shape[2]))
