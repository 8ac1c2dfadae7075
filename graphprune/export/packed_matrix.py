"""A quantized matrix as numpy arrays, and the questions that an ONNX form asks of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from quant import QuantizedTensor, get_format

# What ONNX Runtime's block-wise kernels take.
KERNEL_BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """The weight `levels[codes[n, k]] * absmax[b] + offset[b]`; its block b is `(n * in_features + k) // block_size`.

    Attributes:
        name: What its initializers' names begin with.
        codes: uint8 (out_features, in_features), indices into `levels`.
        absmax: float32 (blocks,), over the row-major flat order: a block may cross rows.
        levels: float32 (levels,), ascending within [-1, 1].
        block_size: Consecutive flat weights that share a scale.
        offset: float32 (blocks,) in affine formats, else None.
    """

    name: str
    codes: npt.NDArray[np.uint8] = field(repr=False)
    absmax: npt.NDArray[np.float32] = field(repr=False)
    levels: npt.NDArray[np.float32] = field(repr=False)
    block_size: int
    offset: npt.NDArray[np.float32] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, quantized: QuantizedTensor) -> PackedMatrix:
        """Return the numpy form of a quantized (out_features, in_features) matrix."""
        return cls(
            name=name,
            codes=quantized.unpacked_codes().cpu().numpy(),
            absmax=quantized.absmax.cpu().numpy(),
            levels=get_format(quantized.format).levels.cpu().numpy(),
            block_size=quantized.block_size,
            offset=None if quantized.offsets is None else quantized.offsets.values().cpu().numpy(),
        )

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix, over which a product sums."""
        return self.codes.shape[1]

    @property
    def bits(self) -> int:
        """Bits of a code in the file: 2, 4 or 8. ONNX Runtime has no 3-bit form."""
        return next(bits for bits in (2, 4, 8) if len(self.levels) <= 2**bits)

    @cached_property
    def grid(self) -> int | None:
        """The m for which every level is the float32 nearest to k / m with an integer k, or None."""
        for m in (1, 3, 7, 127):
            nearest = np.round(self.levels.astype(np.float64) * m) / m
            if np.array_equal(nearest.astype(np.float32), self.levels):
                return m
        return None

    def block(self, largest: int = KERNEL_BLOCKS[0]) -> int | None:
        """Return the largest kernel block within a row whose weights all share a scale, or None.

        Quantization blocks are flat, a kernel's begin anew at each row. They agree on any block that divides
        both the row and the quantization block; scales are then repeated, and no weight changes.
        """
        fitting = (b for b in KERNEL_BLOCKS if b <= largest)
        return next((b for b in fitting if self.in_features % b == 0 and self.block_size % b == 0), None)

    def row_scales(self, block: int) -> npt.NDArray[np.float32]:
        """Return absmax for the blocks of `block` weights in each row: (out_features, in_features / block)."""
        starts = np.arange(0, self.codes.size, block)
        return self.absmax[starts // self.block_size].reshape(self.out_features, -1)

    def packed_high_first(self) -> npt.NDArray[np.uint8]:
        """Return the flat codes as bytes, the first code in the highest bits."""
        return pack(self.codes.reshape(-1), self.bits)


def pack(codes: npt.NDArray[np.uint8], bits: int, *, low_first: bool = False) -> npt.NDArray[np.uint8]:
    """Pack 1-D codes of 2, 4 or 8 bits into bytes, filled up with zeros; the first code lies high or low."""
    per_byte = 8 // bits
    rows = np.pad(codes, (0, -codes.size % per_byte)).reshape(-1, per_byte)
    if low_first:
        rows = rows[:, ::-1]
    packed = np.zeros(len(rows), dtype=np.uint8)
    for column in rows.T:
        shifted = packed << np.uint8(bits % 8)  # a single column of 8 bits has nothing above it
        packed = (shifted | column).astype(np.uint8)
    return packed
