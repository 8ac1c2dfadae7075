"""Block-wise quantization: against float64 numpy, and the invariants that hold for every format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from quant import QuantError, QuantizedTensor, format_names, get_format, quantize

FORMATS = st.sampled_from(format_names())
BLOCKS = st.sampled_from([16, 64])
COUNTS = st.one_of(st.sampled_from([1, 15, 16, 17, 63, 64, 65]), st.integers(1, 300))
SEEDS = st.integers(0, 2**32 - 1)


def weights(seed: int, count: int) -> np.ndarray:
    """Draw weights of mixed size, with whole blocks of zeros among them."""
    generator = np.random.default_rng(seed)
    drawn = generator.standard_normal(count) * 10.0 ** generator.integers(-6, 3)
    drawn[generator.integers(0, count) :][: generator.integers(0, 100)] = 0
    return drawn.astype(np.float32)


def blocks_of(flat: np.ndarray, block_size: int) -> list[np.ndarray]:
    return [flat[i : i + block_size] for i in range(0, len(flat), block_size)]


@given(format=FORMATS, block_size=BLOCKS, count=COUNTS, seed=SEEDS)
def test_each_weight_takes_the_nearest_level_of_its_block(
    format: str, block_size: int, count: int, seed: int
) -> None:
    flat = weights(seed, count)
    quantized = quantize(torch.from_numpy(flat), format, block_size)
    levels = get_format(format).levels.double().numpy()
    codes = quantized.unpacked_codes().numpy()
    for i, block in enumerate(blocks_of(flat.astype(np.float64), block_size)):
        scale = np.abs(block).max()
        assert quantized.absmax[i] == scale
        taken = codes[i * block_size :][: len(block)]
        distances = np.abs(block[:, None] - levels * scale)
        # Where two levels are equally near but for float32 rounding, either may be taken.
        assert (distances[np.arange(len(block)), taken] <= distances.min(axis=1) + 2e-7 * scale).all()
        clear = np.sort(distances, axis=1)[:, 1] - distances.min(axis=1) > 1e-6 * scale
        np.testing.assert_array_equal(taken[clear], distances.argmin(axis=1)[clear])


@given(format=FORMATS, block_size=BLOCKS, count=COUNTS, seed=SEEDS)
def test_the_error_is_at_most_half_the_widest_gap(
    format: str, block_size: int, count: int, seed: int
) -> None:
    flat = weights(seed, count)
    quantized = quantize(torch.from_numpy(flat), format, block_size)
    error = np.abs(flat.astype(np.float64) - quantized.dequantize(torch.float64).numpy())
    half_gap = get_format(format).levels.double().diff().max().item() / 2
    for i, block in enumerate(blocks_of(error, block_size)):
        assert (block <= quantized.absmax[i].item() * (half_gap + 2e-7)).all()


@given(format=FORMATS, block_size=BLOCKS, count=COUNTS, seed=SEEDS)
def test_quantizing_what_was_dequantized_changes_nothing(
    format: str, block_size: int, count: int, seed: int
) -> None:
    once = quantize(torch.from_numpy(weights(seed, count)), format, block_size)
    twice = quantize(once.dequantize(), format, block_size)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.absmax, twice.absmax)
    assert torch.equal(once.dequantize(), twice.dequantize())


@given(format=FORMATS, seed=SEEDS)
def test_dequantizing_is_level_times_scale(format: str, seed: int) -> None:
    quantized = quantize(torch.from_numpy(weights(seed, 7 * 23)).view(7, 23), format, 16)
    levels = get_format(format).levels.numpy()[quantized.unpacked_codes().numpy()]
    scales = np.repeat(quantized.absmax.numpy(), 16)[: 7 * 23].reshape(7, 23)
    np.testing.assert_array_equal(quantized.dequantize().numpy(), levels * scales)
    assert quantized.shape == (7, 23)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantized, same = quantize(weight), quantize(weight.float())
    assert torch.equal(quantized.codes, same.codes)
    assert torch.equal(quantized.absmax, same.absmax)
    assert quantized.dequantize(dtype).dtype == dtype
    assert torch.equal(quantized.dequantize(dtype), quantized.dequantize().to(dtype))


def test_a_block_of_zeros_stays_zero() -> None:
    quantized = quantize(torch.zeros(3, 64), "int4")
    assert torch.equal(quantized.absmax, torch.zeros(3))
    assert torch.equal(quantized.dequantize(), torch.zeros(3, 64))


def test_the_weight_is_not_touched_and_need_not_be_contiguous() -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    assert torch.equal(quantize(weight.T).codes, quantize(weight.T.contiguous()).codes)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("nf4", 4), ("nf3", 3), ("nf2", 2)])
def test_storage_is_the_bits_of_the_format_and_one_float_a_block(format: str, bits: int) -> None:
    assert quantize(torch.ones(64, 64), format, 64).nbytes == 64 * 64 * bits // 8 + 64 * 4


@pytest.mark.parametrize("format", format_names())
def test_the_state_goes_through_safetensors(format: str) -> None:
    weight = torch.randn(5, 21, generator=torch.Generator().manual_seed(1))
    quantized = quantize(weight, format, 16)
    back = QuantizedTensor.from_state_dict(load(save(quantized.state_dict())))
    assert (back.format, back.shape, back.block_size) == (format, (5, 21), 16)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.absmax, quantized.absmax)


def test_a_state_without_its_scales_is_refused() -> None:
    state = quantize(torch.ones(4, 16)).state_dict()
    del state["absmax"]
    with pytest.raises(QuantError, match="absmax"):
        QuantizedTensor.from_state_dict(state)


def test_parts_that_do_not_fit_are_refused() -> None:
    good = quantize(torch.ones(4, 16))
    state = good.state_dict()
    with pytest.raises(QuantError, match="shape"):
        QuantizedTensor.from_state_dict({**state, "codes": good.codes[1:]})
    with pytest.raises(QuantError, match="bfloat16"):
        QuantizedTensor.from_state_dict({**state, "absmax": good.absmax.bfloat16()})


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.tensor([1.0, torch.nan]), "nan"),
        (torch.tensor([1.0, -torch.inf]), "nan or infinity"),
        (torch.tensor([1e300], dtype=torch.float64), "exceeds float32"),
        (torch.zeros(0, 4), "empty"),
        (torch.ones(4, dtype=torch.int64), "int64"),
        (torch.ones(4, device="meta"), "meta"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight: torch.Tensor, match: str) -> None:
    with pytest.raises(QuantError, match=match):
        quantize(weight)


@pytest.mark.parametrize("block_size", [0, 8, 48, 8192, -64])
def test_a_block_size_out_of_range_is_refused(block_size: int) -> None:
    with pytest.raises(QuantError, match=f"block of {block_size} "):
        quantize(torch.ones(4), block_size=block_size)
