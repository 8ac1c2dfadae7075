"""bitsandbytes' kernels give the very numbers that torch does."""

from __future__ import annotations

import pytest
import torch

from quant import quantize
from quant.kernels import dequantize_nf4, has_kernel


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_dequantizes_alike(block_size: int, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, "nf4", block_size)
    found = dequantize_nf4(packed.codes, packed.absmax, packed.shape, block_size, dtype)
    assert torch.equal(found, packed.dequantize(dtype))


def test_a_kernel_is_only_used_where_it_gains() -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    assert not has_kernel(codes, "nf4", 64)  # on the CPU torch's own look-up is as fast
