"""Block-wise quantization: against float64 numpy, and the invariants that hold for every format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from quant import QuantError, QuantizedTensor, blockwise, fit, format_names, get_format, quantize
from quant.fit import fitted_scales
from quant.quantized import stored_nbytes
from quant.scales import DOUBLE_BLOCK, dynamic_levels, store_scales

FORMATS = st.sampled_from(format_names())
SYMMETRIC = st.sampled_from([name for name in format_names() if not get_format(name).affine])
STORAGE = st.sampled_from(["float32", "float16", "double"])
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


@given(format=SYMMETRIC, block_size=BLOCKS, count=COUNTS, seed=SEEDS)
def test_each_weight_takes_the_nearest_level_of_its_block(
    format: str, block_size: int, count: int, seed: int
) -> None:
    flat = weights(seed, count)
    quantized = quantize(torch.from_numpy(flat), format, block_size, fitted=False)
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


@given(format=FORMATS, block_size=BLOCKS, count=COUNTS, storage=STORAGE)
def test_what_a_tensor_takes_is_known_before(format: str, block_size: int, count: int, storage: str) -> None:
    quantized = quantize(torch.ones(count), format, block_size, scale_storage=storage)
    assert stored_nbytes(count, format, block_size, storage) == quantized.nbytes


@given(format=FORMATS, block_size=BLOCKS, count=COUNTS, seed=SEEDS)
def test_the_error_is_at_most_half_the_widest_gap(
    format: str, block_size: int, count: int, seed: int
) -> None:
    flat = weights(seed, count)
    quantized = quantize(torch.from_numpy(flat), format, block_size, fitted=False)
    error = np.abs(flat.astype(np.float64) - quantized.dequantize(torch.float64).numpy())
    half_gap = get_format(format).levels.double().diff().max().item() / 2
    for i, (block, weight) in enumerate(zip(blocks_of(error, block_size), blocks_of(flat, block_size))):
        # In an affine format the scale is half the block's range, never more than its largest weight.
        assert quantized.absmax[i].item() <= np.abs(weight).max() * (1 + 1e-7)
        assert (block <= quantized.absmax[i].item() * half_gap + 3e-7 * np.abs(weight).max()).all()


@given(format=FORMATS, block_size=BLOCKS, count=COUNTS, seed=SEEDS)
def test_quantizing_what_was_dequantized_changes_nothing(
    format: str, block_size: int, count: int, seed: int
) -> None:
    once = quantize(torch.from_numpy(weights(seed, count)), format, block_size, fitted=False)
    twice = quantize(once.dequantize(), format, block_size, fitted=False)
    assert torch.equal(once.codes, twice.codes)
    # A range is measured between two levels, each rounded to float32; a largest weight is a level itself.
    rounding = 3e-7 * float(once.dequantize().abs().max()) if get_format(format).affine else 0
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=0, atol=rounding)
    torch.testing.assert_close(twice.absmax, once.absmax, rtol=0, atol=rounding)


@given(format=FORMATS, block_size=BLOCKS, count=COUNTS, seed=SEEDS)
def test_fitted_scales_are_never_worse_than_covering_ones(
    format: str, block_size: int, count: int, seed: int
) -> None:
    flat = torch.from_numpy(weights(seed, count))
    covering, fitted = (quantize(flat, format, block_size, fitted=fitted) for fitted in (False, True))
    squares = [
        [np.square(block).sum() for block in blocks_of((flat - q.dequantize()).double().numpy(), block_size)]
        for q in (covering, fitted)
    ]
    slack = [1e-6 * np.square(block).sum() for block in blocks_of(flat.double().numpy(), block_size)]
    assert all(after <= before + more for before, after, more in zip(*squares, slack, strict=True))


@pytest.mark.parametrize("skewed", [False, True])
def test_a_fitted_block_is_near_the_best_of_a_dense_search(skewed: bool) -> None:
    generator = np.random.default_rng(0)
    blocks = generator.exponential(size=(40, 64)) - 1 if skewed else generator.standard_normal((40, 64))
    levels = get_format("uint2").levels.double().numpy()
    found = quantize(torch.from_numpy(blocks), "uint2", 64).dequantize(torch.float64).numpy()
    errors = np.square(blocks - found).sum(axis=1)
    best = np.array([_least_error(block, levels) for block in blocks])
    assert (errors <= 1.3 * best).all()
    assert errors.sum() <= 1.05 * best.sum()


@pytest.mark.parametrize("format", format_names())
def test_work_in_chunks_changes_nothing(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.randn(30, 17, generator=torch.Generator().manual_seed(0)) + 0.3
    at_once = quantize(drawn, format, 16)
    for module in (fit, blockwise):
        monkeypatch.setattr(module, "CHUNK", 16 * 3)
    in_chunks = quantize(drawn, format, 16)
    assert torch.equal(at_once.codes, in_chunks.codes)
    assert torch.equal(at_once.dequantize(), in_chunks.dequantize())


@pytest.mark.parametrize("format", ["nf2", "uint2"])
def test_blocks_are_fitted_each_by_its_own_importance(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(50, 16, generator=generator)
    importance = torch.rand(50, 16, generator=generator) ** 4
    monkeypatch.setattr(fit, "CHUNK", 16 * 7)
    found = fitted_scales(blocks, get_format(format), importance)
    for i in range(50):
        alone = fitted_scales(blocks[i : i + 1], get_format(format), importance[i])
        for one, of_all in zip(alone, found, strict=True):
            assert one is None if of_all is None else torch.allclose(one[0], of_all[i], rtol=1e-6)


def _least_error(block: np.ndarray, levels: np.ndarray) -> float:
    scales, offsets = np.linspace(0.7, 2.4, 60), np.linspace(-0.8, 1.6, 90)
    return min(
        np.square(block - _snapped(block, levels * scale + offset)).sum()
        for scale in scales
        for offset in offsets
    )


def _snapped(block: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.abs(block[:, None] - levels).argmin(axis=1)]


@given(format=FORMATS, storage=STORAGE, seed=SEEDS)
def test_rows_of_whole_blocks_are_taken_without_dequantizing(format: str, storage: str, seed: int) -> None:
    drawn = torch.randn(100, 48, generator=torch.Generator().manual_seed(seed))
    quantized = quantize(
        drawn, format, 16, scale_storage=storage
    )  # 300 scales, of which 256 share one of theirs
    index = torch.tensor([3, 99, 3, 85, 0])
    assert torch.equal(quantized.rows(index).dequantize(), quantized.dequantize()[index])
    with pytest.raises(QuantError, match="cross rows"):
        quantize(drawn, format, 64).rows(index)


@given(format=FORMATS, seed=SEEDS, factor=st.sampled_from([1.0, -2.0, 2.0**40, 2.0**-40]))
def test_a_power_of_two_goes_through_quantization(format: str, seed: int, factor: float) -> None:
    drawn = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed))
    mirrored = torch.equal(get_format(format).levels, -get_format(format).levels.flip(0))
    if factor > 0 or mirrored:
        scaled = quantize(drawn * factor, format, 16).dequantize()
        torch.testing.assert_close(
            scaled, quantize(drawn, format, 16).dequantize() * factor, rtol=1e-5, atol=0
        )


@given(format=FORMATS, seed=SEEDS)
def test_dequantizing_is_level_times_scale(format: str, seed: int) -> None:
    quantized = quantize(torch.from_numpy(weights(seed, 7 * 23)).view(7, 23), format, 16)
    levels = get_format(format).levels.numpy()[quantized.unpacked_codes().numpy()]
    scales = np.repeat(quantized.absmax.numpy(), 16)[: 7 * 23].reshape(7, 23)
    offsets = np.zeros(11) if quantized.offsets is None else quantized.offsets.values().numpy()
    expected = levels * scales + np.repeat(offsets, 16)[: 7 * 23].reshape(7, 23).astype(np.float32)
    np.testing.assert_array_equal(quantized.dequantize().numpy(), expected)
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
    assert torch.equal(back.dequantize(), quantized.dequantize())
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
    with pytest.raises(QuantError, match="nf4 has no offsets"):
        QuantizedTensor.from_state_dict({**state, "offset": good.absmax})
    with pytest.raises(QuantError, match="uint4 needs offsets"):
        QuantizedTensor.from_state_dict({**state, "format": torch.tensor(list(b"uint4"), dtype=torch.uint8)})


@pytest.mark.parametrize("format", format_names())
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 70),
        torch.full((3, 70), -0.3),
        torch.tensor([[2.5]]),
        torch.full((2, 40), 1e-40),
        torch.linspace(-1e30, 1e30, 130),
        torch.linspace(-1, 1, 130) * 3e38,
        torch.linspace(-1, 1, 130).bfloat16(),
    ],
    ids=["zero", "constant", "one", "denormal", "1e30", "largest", "bfloat16"],
)
def test_unusual_weights_stay_within_the_bound(format: str, weight: torch.Tensor) -> None:
    exact = weight.double()
    half_gap = get_format(format).levels.double().diff().max().item() / 2
    for fitted in (False, True):
        quantized = quantize(weight, format, 32, fitted=fitted)
        values = quantized.dequantize(torch.float64)
        assert values.isfinite().all()
        bound = exact.abs().max() * (half_gap if not fitted else 1) + 1e-44
        assert ((values - exact).abs() <= bound * (1 + 1e-6)).all()
        if exact.min() == exact.max() and -1 in get_format(format).levels:
            torch.testing.assert_close(values, exact, rtol=2e-6, atol=2e-45)


@given(format=FORMATS, storage=STORAGE, seed=SEEDS)
def test_stored_scales_cost_little(format: str, storage: str, seed: int) -> None:
    drawn = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    plain, stored = (quantize(drawn, format, 64, scale_storage=kind) for kind in ("float32", storage))
    error, plain_error = ((drawn - q.dequantize()).norm() for q in (stored, plain))
    assert error <= plain_error * 1.01 + 0.005 * drawn.norm()
    each = {"float32": 4, "float16": 2, "double": 1}[storage]
    numbers = (2 if get_format(format).affine else 1) * (64 * each + (8 if storage == "double" else 0))
    assert stored.nbytes == 64 * 64 * get_format(format).bits // 8 + numbers


@given(count=st.integers(1, 600), seed=SEEDS)
def test_doubly_quantized_scales_take_the_nearest_level(count: int, seed: int) -> None:
    scales = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    stored = store_scales(scales, "double")
    assert stored.absmax is not None
    assert stored.mean is not None
    for start in range(0, count, DOUBLE_BLOCK):
        part = scales[start : start + DOUBLE_BLOCK]
        levels = dynamic_levels() * stored.absmax[start // DOUBLE_BLOCK] + stored.mean
        nearest = (part[:, None] - levels).abs().amin(dim=1)
        error = (stored.values()[start : start + DOUBLE_BLOCK] - part).abs()
        assert (error <= nearest + 1e-6).all()


@pytest.mark.parametrize("format", ["uint2", "uint4", "uint8", "nf4"])
def test_float16_scales_hold_offsets_and_blocks_near_zero(format: str) -> None:
    """Beside scales of ordinary size such numbers may lose digits: the error is that of float32 scales."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[5] *= 1e-5
    weight[6] = torch.linspace(-0.03, 0.03, 64) + 1e-7
    exact, stored = (quantize(weight, format, scale_storage=kind) for kind in ("float32", "float16"))
    errors = [(weight - packed.dequantize()).norm() for packed in (exact, stored)]
    assert errors[1] < errors[0] * 1.02
    assert (weight - stored.dequantize())[5].abs().max() < 1e-6


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(QuantError, match="the weight is a list"):
        quantize([1.0, 2.0])  # type: ignore[arg-type]


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    for size in (1e6, 1e-7):
        with pytest.raises(QuantError, match="float16"):
            quantize(torch.randn(64) * size, scale_storage="float16")
    with pytest.raises(QuantError, match="int5"):
        quantize(torch.randn(64), scale_storage="int5")


def test_what_cannot_be_quantized_is_named() -> None:
    with pytest.raises(QuantError, match=r"layers\.0\.up of shape"):
        quantize(torch.tensor([torch.nan]), name="layers.0.up")


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


@pytest.mark.parametrize("format", ["nf4", "uint2"])
def test_scales_near_the_end_of_float32_are_doubly_quantized_too(format: str) -> None:
    drawn = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    small, large = (
        quantize(drawn * size, format, scale_storage="double").dequantize(torch.float64) / size
        for size in (1.0, 2.0**126)
    )
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-4)


def test_a_quantized_tensor_is_shown_without_its_codes() -> None:
    shown = repr(quantize(torch.zeros(3, 64), "nf4"))
    assert shown == "QuantizedTensor(3, 64, format=nf4, block_size=64, nbytes=108)"
