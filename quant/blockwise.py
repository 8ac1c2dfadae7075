"""Block-wise quantization: each run of consecutive weights shares a scale, its largest absolute value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quant.codebooks import get_format
from quant.errors import QuantError
from quant.packing import pack, packed_size, symbols, unpack

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A tensor as packed codes and one scale a block, over its row-major flat order.

    Attributes:
        codes: uint8 (bytes,), packed by `quant.packing`.
        absmax: float32 (blocks,), the largest absolute value of each block.
        shape: Shape of the tensor that was quantized.
        format: Name of the format.
        block_size: Consecutive elements that share a scale; the last block may be shorter.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    format: str
    block_size: int

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        count = math.prod(self.shape)
        sizes = packed_size(count, get_format(self.format).bits), -(-count // self.block_size)
        found = tuple(self.codes.shape), tuple(self.absmax.shape)
        if found != ((sizes[0],), (sizes[1],)) or self.codes.dtype != torch.uint8:
            raise QuantError(
                f"{self.format} codes {found[0]} ({self.codes.dtype}) and absmax {found[1]} are not those of "
                f"a tensor of shape {self.shape} in blocks of {self.block_size}",
                f"pass {sizes[0]} uint8 codes and {sizes[1]} scales",
            )
        if self.absmax.dtype != torch.float32:
            raise QuantError(f"absmax is {self.absmax.dtype}", "keep the scales in float32")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the tensor that the codes stand for, computed in float32, in `dtype` (shape `shape`)."""
        count = math.prod(self.shape)
        table = get_format(self.format).symbol_values.to(self.codes.device)
        flat = table.index_select(0, symbols(self.codes, get_format(self.format).bits)).view(-1)[:count]
        whole = count // self.block_size
        blocks = flat[: whole * self.block_size].view(whole, self.block_size)
        blocks.mul_(self.absmax[:whole, None])
        flat[whole * self.block_size :].mul_(self.absmax[whole:])
        return flat.view(self.shape).to(dtype)

    def unpacked_codes(self) -> Tensor:
        """Return the codes one a byte: uint8 of shape `shape`, each an index into the format's levels."""
        return unpack(self.codes, get_format(self.format).bits, math.prod(self.shape)).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.absmax.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors alone, ready for a safetensors file; `from_state_dict` is the way back."""
        return {
            "codes": self.codes,
            "absmax": self.absmax,
            "shape": torch.tensor(self.shape, dtype=torch.int64),
            "format": torch.tensor(list(self.format.encode()), dtype=torch.uint8),
            "block_size": torch.tensor(self.block_size, dtype=torch.int64),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> QuantizedTensor:
        """Return the tensor that `state_dict` described.

        Raises:
            QuantError: A part is missing or does not fit the others.
        """
        missing = {"codes", "absmax", "shape", "format", "block_size"} - state.keys()
        if missing:
            raise QuantError(
                f"a quantized tensor lacks {', '.join(sorted(missing))}", "pass a whole state_dict()"
            )
        return cls(
            codes=state["codes"],
            absmax=state["absmax"],
            shape=tuple(state["shape"].tolist()),
            format=bytes(state["format"].tolist()).decode(),
            block_size=int(state["block_size"]),
        )


def quantize(weight: Tensor, format: str = "nf4", block_size: int = 64) -> QuantizedTensor:
    """Quantize a tensor: in each block divide by the largest absolute value, then take the nearest level.

    Args:
        weight: Floating point, any shape and dtype, computed in float32; finite and not empty.
        format: A name of `quant.format_names()`.
        block_size: Consecutive elements, row-major, that share a scale: a power of two from 16 to 4096.

    Returns:
        The packed tensor, on the weight's device. A block of zeros has the scale 0.

    Raises:
        QuantError: Unknown format, wrong block size, or a weight that is empty, on the meta device, of
            integers, or not finite.

    Source: Dettmers et al., 8-bit Optimizers (arXiv 2110.02861) section 2.1.
    """
    codebook = get_format(format)
    check_block_size(block_size)
    _check_kind(weight)
    flat = weight.detach().reshape(-1).to(torch.float32)
    count = flat.numel()
    blocks = functional.pad(flat, (0, -count % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    _check_finite(absmax, tuple(weight.shape))
    divisor = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    codes = codebook.nearest(blocks / divisor[:, None])
    return QuantizedTensor(
        codes=pack(codes.view(-1)[:count], codebook.bits),
        absmax=absmax,
        shape=tuple(weight.shape),
        format=format,
        block_size=block_size,
    )


def check_block_size(block_size: int) -> None:
    """Raise QuantError unless the block size is a power of two from 16 to 4096."""
    if not SMALLEST_BLOCK <= block_size <= LARGEST_BLOCK or block_size & (block_size - 1):
        raise QuantError(
            f"a block of {block_size} weights is not possible",
            f"use a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}, such as 64",
        )


def check_weight(weight: Tensor) -> None:
    """Raise QuantError unless `quantize` can take this weight: real, floating point, finite, not empty."""
    _check_kind(weight)
    _check_finite(weight.detach().to(torch.float32).abs().amax(), tuple(weight.shape))


def _check_kind(weight: Tensor) -> None:
    shape = tuple(weight.shape)
    if not weight.is_floating_point():
        raise QuantError(
            f"a weight of dtype {weight.dtype} cannot be quantized", "pass a floating-point weight"
        )
    if weight.is_meta:
        raise QuantError(
            f"the weight of shape {shape} is on the meta device and has no data", "load it first"
        )
    if weight.numel() == 0:
        raise QuantError(f"the weight of shape {shape} is empty", "leave this layer out")


def _check_finite(largest: Tensor, shape: tuple[int, ...]) -> None:
    if not bool(largest.isfinite().all()):
        raise QuantError(
            f"the weight of shape {shape} holds nan or infinity, or exceeds float32",
            "repair the weight before quantizing it",
        )
