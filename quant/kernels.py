"""Faster ways to dequantize where a library that has them is installed; the results are the same numbers."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def has_kernel(codes: Tensor, format: str, block_size: int) -> bool:
    """Tell whether bitsandbytes is installed and dequantizes this format on this device faster than torch."""
    return (
        codes.is_cuda and format == "nf4" and block_size in BITSANDBYTES_BLOCKS and _bitsandbytes_is_there()
    )


def dequantize_nf4(
    codes: Tensor, absmax: Tensor, shape: tuple[int, ...], block_size: int, dtype: torch.dtype
) -> Tensor:
    """Dequantize NF4 by bitsandbytes.

    Args:
        codes: uint8 (bytes,), the first code in the high bits, as both libraries pack them.
        absmax: float32 (blocks,).
        shape: Of the result.
        block_size: Weights that share a scale; one of `BITSANDBYTES_BLOCKS`.
        dtype: Of the result: float32, float16 or bfloat16.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(
        absmax=absmax, shape=torch.Size(shape), dtype=dtype, blocksize=block_size, quant_type="nf4"
    )
    return dequantize_4bit(codes.view(-1, 1), quant_state=state)


@cache
def _bitsandbytes_is_there() -> bool:
    return find_spec("bitsandbytes") is not None
