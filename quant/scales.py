"""The scales of blocks, or their offsets, as they are stored: float32, float16, or quantized once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from quant.errors import QuantError

Storage = Literal["float32", "float16", "double"]
DOUBLE_BLOCK = 256
"""Scales that share a scale of their own under double quantization, as in QLoRA and bitsandbytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scales:
    """One number a block.

    Attributes:
        stored: (blocks,): float32 or float16 as they are, or uint8 codes under double quantization.
        absmax: float32 (ceil(blocks / 256),), the scales of the codes; None without double quantization.
        mean: float32 (), what was subtracted before; None without double quantization.
    """

    stored: Tensor
    absmax: Tensor | None = None
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        double = self.stored.dtype == torch.uint8
        if self.stored.dtype not in (torch.float32, torch.float16, torch.uint8):
            raise QuantError(f"scales of {self.stored.dtype}", "keep them in float32, float16 or uint8 codes")
        whole = self.absmax is not None and self.mean is not None
        if double != whole or (self.absmax is not None and len(self.absmax) != _groups(len(self.stored))):
            raise QuantError(
                f"{len(self.stored)} scales of {self.stored.dtype} with "
                f"{'no' if self.absmax is None else len(self.absmax)} scales of their own",
                f"double quantization takes one for each {DOUBLE_BLOCK} and a mean; other storage none",
            )

    @property
    def storage(self) -> Storage:
        """How the numbers are stored."""
        if self.stored.dtype == torch.uint8:
            return "double"
        return "float32" if self.stored.dtype == torch.float32 else "float16"

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts().values())

    def values(self) -> Tensor:
        """Return the numbers: float32 (blocks,)."""
        if self.absmax is None or self.mean is None:
            return self.stored.to(torch.float32)
        spread = self.absmax.repeat_interleave(DOUBLE_BLOCK)[: len(self.stored)]
        return dynamic_levels().to(self.stored.device)[self.stored.to(torch.int32)] * spread + self.mean

    def at(self, blocks: Tensor) -> Scales:
        """Return the scales of some blocks.

        Args:
            blocks: int64 indices, any number of them. Under double quantization the result is decoded.
        """
        if self.absmax is None or self.mean is None:
            return Scales(stored=self.stored.index_select(0, blocks))
        levels = dynamic_levels().to(blocks.device)[self.stored.index_select(0, blocks).to(torch.int32)]
        return Scales(stored=levels * self.absmax.index_select(0, blocks // DOUBLE_BLOCK) + self.mean)

    def scaled(self, exponent: int) -> Scales:
        """Return the scales times a power of two, stored alike.

        Raises:
            QuantError: float16 cannot hold them.
        """
        if self.absmax is None or self.mean is None:
            return store_scales(_shifted(self.stored, exponent), self.storage)
        return Scales(
            stored=self.stored, absmax=_shifted(self.absmax, exponent), mean=_shifted(self.mean, exponent)
        )

    def parts(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors by name; `from_parts` is the way back."""
        parts = {"": self.stored, "_absmax": self.absmax, "_mean": self.mean}
        return {prefix + name: part for name, part in parts.items() if part is not None}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], prefix: str = "") -> Scales:
        """Return the scales of `parts`, whose other entries are left alone; KeyError without any."""
        return cls(
            stored=parts[prefix], absmax=parts.get(f"{prefix}_absmax"), mean=parts.get(f"{prefix}_mean")
        )


def stored_scales_nbytes(blocks: int, storage: Storage) -> int:
    """Return the bytes that one number a block takes."""
    if storage == "double":
        return blocks + 4 * _groups(blocks) + 4
    return blocks * (4 if storage == "float32" else 2)


def store_scales(values: Tensor, storage: Storage) -> Scales:
    """Store one number a block.

    Args:
        values: float32 (blocks,), finite.
        storage: "float32"; "float16"; or "double": 8-bit codes of what differs from their mean, with a float32
            scale for each 256, a little more than one byte a block.

    Raises:
        QuantError: Unknown storage, or numbers that float16 cannot hold.

    Source: QLoRA (arXiv 2305.14314) section 3, "Double Quantization", as bitsandbytes does it.
    """
    check_storage(storage)
    if storage == "float32":
        return Scales(stored=values)
    if storage == "float16":
        return Scales(stored=_as_float16(values))
    mean = values.mean()
    if not bool(mean.isfinite()):
        mean = values.to(torch.float64).mean().to(torch.float32)
    centred = functional.pad(values - mean, (0, -len(values) % DOUBLE_BLOCK)).view(-1, DOUBLE_BLOCK)
    absmax = centred.abs().amax(dim=1)
    if not bool(absmax.isfinite().all()):
        raise QuantError("scales differ by more than float32 can hold", 'store them as "float32"')
    scaled = centred / torch.where(absmax > 0, absmax, torch.ones_like(absmax))[:, None]
    levels = dynamic_levels().to(values.device)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return Scales(stored=codes.view(-1)[: len(values)].to(torch.uint8), absmax=absmax, mean=mean)


def _shifted(values: Tensor, exponent: int) -> Tensor:
    # float32 cannot hold the power itself where weights are at its ends.
    return torch.ldexp(values.to(torch.float64), torch.tensor(exponent)).to(torch.float32)


def check_storage(storage: str) -> None:
    """Raise QuantError unless scales can be stored this way."""
    if storage not in get_args(Storage):
        raise QuantError(
            f"scales cannot be stored as {storage!r}", f"use one of {', '.join(get_args(Storage))}"
        )


@cache
def dynamic_levels() -> Tensor:
    """Return the 256 levels of bitsandbytes' signed dynamic 8-bit code, ascending: float32.

    Between zero and one, seven decades; the highest has 64 levels of each sign, each lower one half as many.

    Source: Dettmers, 8-Bit Approximations (arXiv 1511.04561) section 2.
    """
    positive: list[Tensor] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    magnitudes = torch.cat(positive)
    return torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, 1.0])]).sort().values


def _as_float16(values: Tensor) -> Tensor:
    stored = values.to(torch.float16)
    error = (stored.to(torch.float32) - values).abs()
    # Against the largest: an offset near zero, or the scale of a block near zero, is off by nothing that counts.
    if bool((error > values.abs().max() * torch.finfo(torch.float16).eps).any()):
        low, high = (float(value) for value in values.abs().aminmax())
        raise QuantError(
            f"scales from {low:.3g} to {high:.3g} are out of float16's range",
            'store them as "float32" or "double"',
        )
    return stored


def _groups(blocks: int) -> int:
    return -(-blocks // DOUBLE_BLOCK)
