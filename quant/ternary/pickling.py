"""uint16 tensors for pickle, which torch writes to its own files but not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Bits16:
    """A uint16 tensor of the same bits.

    Attributes:
        signed: int16.
    """

    signed: Tensor


def without_uint16(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | Bits16 | None]:
    """Return tensors by name, those of uint16 as ones that pickle can write; nothing is copied."""
    return {
        name: Bits16(held.view(torch.int16)) if held is not None and held.dtype == torch.uint16 else held
        for name, held in tensors.items()
    }


def with_uint16(tensors: Mapping[str, Tensor | Bits16 | None]) -> dict[str, Tensor | None]:
    """Return what `without_uint16` was given."""
    return {
        name: held.signed.view(torch.uint16) if isinstance(held, Bits16) else held
        for name, held in tensors.items()
    }
