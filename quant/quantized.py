"""A quantized tensor: packed codes, a scale a block, and in affine formats an offset."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.codebooks import get_format
from quant.errors import QuantError
from quant.kernels import dequantize_nf4, has_kernel
from quant.packing import packed_size, symbols, unpack
from quant.scales import Scales, Storage, stored_scales_nbytes

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 4096
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PART_NAMES = ("codes", "absmax", "absmax_absmax", "absmax_mean", "offset", "offset_absmax", "offset_mean")
"""All names that the parts of a quantized tensor can have."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A tensor as packed codes and a scale a block, over its row-major flat order.

    Attributes:
        codes: uint8 (bytes,), packed by `quant.packing`.
        scales: One a block; a weight is ``level * scale``, or ``level * scale + offset``.
        offsets: One a block in affine formats, else None.
        shape: Shape of the tensor that was quantized.
        format: Name of the format.
        block_size: Consecutive elements that share a scale; the last block may be shorter.
    """

    codes: Tensor
    scales: Scales
    offsets: Scales | None = None
    shape: tuple[int, ...]
    format: str
    block_size: int

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        count, format = math.prod(self.shape), get_format(self.format)
        sizes = packed_size(count, format.bits), block_count(count, self.block_size)
        found = tuple(self.codes.shape), tuple(self.scales.stored.shape)
        if found != ((sizes[0],), (sizes[1],)) or self.codes.dtype != torch.uint8:
            raise QuantError(
                f"{self.format} codes {found[0]} ({self.codes.dtype}) and scales {found[1]} are not those of "
                f"a tensor of shape {self.shape} in blocks of {self.block_size}",
                f"pass {sizes[0]} uint8 codes and {sizes[1]} scales",
            )
        if format.affine != (self.offsets is not None):
            raise QuantError(
                f"{self.format} {'needs' if format.affine else 'has no'} offsets",
                "pass what quantize() returned",
            )

    def __repr__(self) -> str:
        size = ", ".join(map(str, self.shape))
        return f"QuantizedTensor({size}, format={self.format}, block_size={self.block_size}, nbytes={self.nbytes})"

    @property
    def absmax(self) -> Tensor:
        """The scales: float32 (blocks,); without fitting, each block's largest absolute value."""
        return self.scales.values()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the tensor that the codes stand for, computed in float32, in `dtype` (shape `shape`)."""
        count = math.prod(self.shape)
        format = get_format(self.format)
        width = self.shape[-1] if self.shape else 1
        if dtype in KERNEL_DTYPES and has_kernel(self.codes, self.format, self.block_size, width):
            return dequantize_nf4(self.codes, self.absmax, self.shape, self.block_size, dtype)
        table = format.symbol_values.to(self.codes.device)
        flat = table.index_select(0, symbols(self.codes, format.bits)).view(-1)[:count]
        _scale_(
            flat,
            self.scales.values(),
            None if self.offsets is None else self.offsets.values(),
            self.block_size,
        )
        return flat.view(self.shape).to(dtype)

    def scaled(self, exponent: int) -> QuantizedTensor:
        """Return this tensor times a power of two, which multiplies its scales exactly.

        Args:
            exponent: Of the power.

        Raises:
            QuantError: float16 cannot hold the scales.
        """
        offsets = None if self.offsets is None else self.offsets.scaled(exponent)
        return replace(self, scales=self.scales.scaled(exponent), offsets=offsets)

    def rows(self, index: Tensor) -> QuantizedTensor:
        """Return some rows of a matrix whose rows are whole blocks, without dequantizing any.

        Args:
            index: int64 (rows,).

        Raises:
            QuantError: A block crosses rows.
        """
        width = self.shape[-1]
        if len(self.shape) != 2 or width % self.block_size:
            raise QuantError(
                f"blocks of {self.block_size} cross rows of {width}", "dequantize the whole tensor"
            )
        bytes_a_row = width * get_format(self.format).bits // 8
        blocks = torch.arange(width // self.block_size, device=index.device)
        wanted = (index[:, None] * len(blocks) + blocks).reshape(-1)
        return QuantizedTensor(
            codes=self.codes.view(-1, bytes_a_row).index_select(0, index).view(-1),
            scales=self.scales.at(wanted),
            offsets=None if self.offsets is None else self.offsets.at(wanted),
            shape=(len(index), width),
            format=self.format,
            block_size=self.block_size,
        )

    def tiles(self, most: int) -> Iterator[tuple[int, int, QuantizedTensor]]:
        """Cut a matrix into runs of whole rows and whole blocks, without dequantizing any.

        Args:
            most: Weights a tile at most, unless fewer are not to be had.

        Yields:
            First row, the row behind the last one, and the tile.
        """
        rows, width = self.shape
        fewest = self.block_size // math.gcd(self.block_size, width)
        step = max(1, most // (width * fewest)) * fewest
        bits = get_format(self.format).bits
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            if stop - start == rows:
                yield start, stop, self
                return
            first, last = start * width // self.block_size, block_count(stop * width, self.block_size)
            blocks = torch.arange(first, last, device=self.codes.device)
            yield (
                start,
                stop,
                QuantizedTensor(
                    codes=self.codes[start * width * bits // 8 : packed_size(stop * width, bits)],
                    scales=self.scales.at(blocks),
                    offsets=None if self.offsets is None else self.offsets.at(blocks),
                    shape=(stop - start, width),
                    format=self.format,
                    block_size=self.block_size,
                ),
            )

    def unpacked_codes(self) -> Tensor:
        """Return the codes one a byte: uint8 of shape `shape`, each an index into the format's levels."""
        return unpack(self.codes, get_format(self.format).bits, math.prod(self.shape)).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors alone, by name; `from_parts` is the way back."""
        offsets = {} if self.offsets is None else self.offsets.parts("offset")
        return {"codes": self.codes, **self.scales.parts("absmax"), **offsets}

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], *, shape: tuple[int, ...], format: str, block_size: int
    ) -> QuantizedTensor:
        """Return the tensor of these parts.

        Raises:
            QuantError: A part is missing or does not fit the others.
        """
        if not {"codes", "absmax"} <= parts.keys():
            missing = sorted({"codes", "absmax"} - parts.keys())
            raise QuantError(f"a quantized tensor lacks {' and '.join(missing)}", "pass all of its parts")
        return cls(
            codes=parts["codes"],
            scales=Scales.from_parts(parts, "absmax"),
            offsets=Scales.from_parts(parts, "offset") if "offset" in parts else None,
            shape=shape,
            format=format,
            block_size=block_size,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors alone, ready for a safetensors file; `from_state_dict` is the way back."""
        return {
            **self.parts(),
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
        return cls.from_parts(
            state,
            shape=tuple(state["shape"].tolist()),
            format=bytes(state["format"].tolist()).decode(),
            block_size=int(state["block_size"]),
        )


def check_block_size(block_size: int) -> None:
    """Raise QuantError unless the block size is a power of two from 16 to 4096."""
    whole = isinstance(block_size, int)
    if not whole or not SMALLEST_BLOCK <= block_size <= LARGEST_BLOCK or block_size & (block_size - 1):
        raise QuantError(
            f"a block of {block_size!r} weights is not possible",
            f"use a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}, such as 64",
        )


def block_count(count: int, block_size: int) -> int:
    """Return how many blocks `count` weights fill."""
    return -(-count // block_size)


def stored_nbytes(count: int, format: str | int, block_size: int, scale_storage: Storage = "float32") -> int:
    """Return the bytes of codes, scales and offsets that a tensor of `count` weights takes."""
    codebook = get_format(format)
    scales = stored_scales_nbytes(block_count(count, block_size), scale_storage)
    return packed_size(count, codebook.bits) + scales * (2 if codebook.affine else 1)


def _scale_(flat: Tensor, scale: Tensor, offset: Tensor | None, block_size: int) -> None:
    """Multiply levels by the scales of their blocks and add the offsets, in place."""
    whole = len(flat) // block_size
    blocks = flat[: whole * block_size].view(whole, block_size)
    rest = flat[whole * block_size :]
    blocks.mul_(scale[:whole, None])
    rest.mul_(scale[whole:])
    if offset is not None:
        blocks.add_(offset[:whole, None])
        rest.add_(offset[whole:])
