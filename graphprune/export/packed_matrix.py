"""A quantized matrix as numpy arrays, and the questions that an ONNX form asks of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from quant import QuantizedTensor, get_format
from quant.scales import Scales

# What ONNX Runtime's block-wise kernels take.
KERNEL_BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """The weight `levels[codes[n, k]] * absmax[b] + offset[b]`; its block b is `(n * in_features + k) // block_size`.

    Attributes:
        name: What its initializers' names begin with.
        codes: uint8 (out_features, in_features), indices into `levels`.
        scales: absmax, (blocks,) over the row-major flat order, as it is stored: a block may cross rows.
        levels: float32 (levels,), ascending within [-1, 1].
        block_size: Consecutive flat weights that share a scale.
        offsets: (blocks,) in affine formats, else None.
    """

    name: str
    codes: npt.NDArray[np.uint8] = field(repr=False)
    scales: Scales = field(repr=False)
    levels: npt.NDArray[np.float32] = field(repr=False)
    block_size: int
    offsets: Scales | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, quantized: QuantizedTensor) -> PackedMatrix:
        """Return the numpy form of a quantized (out_features, in_features) matrix."""
        return cls(
            name=name,
            codes=quantized.unpacked_codes().cpu().numpy(),
            scales=quantized.scales,
            levels=get_format(quantized.format).levels.cpu().numpy(),
            block_size=quantized.block_size,
            offsets=quantized.offsets,
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
        """Bits of a code in ONNX Runtime's kernels: 2, 4 or 8."""
        return next(bits for bits in (2, 4, 8) if len(self.levels) <= 2**bits)

    @property
    def stored_bits(self) -> int:
        """Bits of a code in the file: 2, 3, 4 or 8."""
        return 3 if 4 < len(self.levels) <= 8 else self.bits

    @cached_property
    def even(self) -> bool:
        """Whether the levels are evenly spaced from -1 to 1, each the float32 nearest to its place."""
        places = np.linspace(-1, 1, len(self.levels), dtype=np.float64)
        return np.array_equal(places.astype(np.float32), self.levels)

    def block(self, largest: int = KERNEL_BLOCKS[0]) -> int | None:
        """Return the largest kernel block within a row whose weights all share a scale, or None.

        Quantization blocks are flat, a kernel's begin anew at each row. They agree on any block that divides
        both the row and the quantization block; scales are then repeated, and no weight changes.
        """
        fitting = (b for b in KERNEL_BLOCKS if b <= largest)
        return next((b for b in fitting if self.in_features % b == 0 and self.block_size % b == 0), None)


def pack(codes: npt.NDArray[np.uint8], bits: int, *, low_first: bool = False) -> npt.NDArray[np.uint8]:
    """Pack 1-D codes of 1, 2, 4 or 8 bits into bytes, filled up with zeros; the first code lies high or low."""
    per_byte = 8 // bits
    rows = np.pad(codes, (0, -codes.size % per_byte)).reshape(-1, per_byte)
    if low_first:
        rows = rows[:, ::-1]
    packed = np.zeros(len(rows), dtype=np.uint8)
    for column in rows.T:
        shifted = packed << np.uint8(bits % 8)  # a single column of 8 bits has nothing above it
        packed = (shifted | column).astype(np.uint8)
    return packed
