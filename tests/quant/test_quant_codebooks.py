"""Codebooks: the levels against their published or defined values, and the registry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant import QuantError, format_names, get_format, quantize, register_format
from quant.codebooks import BEST_FORMATS, FORMATS
from quant.formats.lloyd_max import lloyd_max_levels
from quant.formats.normal_float import normal_float_levels
from quant.formats.uniform import symmetric_levels

PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
]  # fmt: skip

# The outermost level for a standard normal: Max's table for 4 and 8 outputs, Lloyd's for 16.
LARGEST_LLOYD_MAX = {2: 1.510, 3: 2.152, 4: 2.733}


def test_nf4_is_the_published_table_exactly() -> None:
    assert torch.equal(get_format("nf4").levels, torch.tensor(PUBLISHED_NF4, dtype=torch.float32))


def test_the_definition_gives_the_published_table() -> None:
    assert np.abs(np.array(normal_float_levels(4)) - np.array(PUBLISHED_NF4)).max() < 1.2e-7


def test_nf2_and_nf3_are_those_of_loftqs_code() -> None:
    nf3 = [-1, -0.47862916, -0.21714182, 0, 0.16093017, 0.33791519, 0.56261697, 1]
    np.testing.assert_allclose(get_format("nf2").levels, [-1, 0, 0.33791519, 1], atol=1e-7)
    np.testing.assert_allclose(get_format("nf3").levels, nf3, atol=1e-7)


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7), ("int3", 3), ("int2", 1)])
def test_uniform_grids_are_symmetric(name: str, largest: int) -> None:
    expected = np.arange(-largest, largest + 1) / largest
    np.testing.assert_array_equal(get_format(name).levels, expected.astype(np.float32))


@pytest.mark.parametrize(("name", "bits"), [("uint8", 8), ("uint4", 4), ("uint3", 3), ("uint2", 2)])
def test_grids_over_a_range_are_even(name: str, bits: int) -> None:
    np.testing.assert_allclose(get_format(name).levels, np.linspace(-1, 1, 2**bits), atol=6e-8)
    assert get_format(name).affine


# Max, Quantizing for Minimum Distortion (1960), table I: positive levels for 4 and 8 outputs.
@pytest.mark.parametrize(("bits", "published"), [(2, [0.4528, 1.510]), (3, [0.2451, 0.7560, 1.344, 2.152])])
def test_lloyd_max_levels_are_the_published_ones(bits: int, published: list[float]) -> None:
    positive = np.array(lloyd_max_levels(bits)[2 ** (bits - 1) :])
    np.testing.assert_allclose(positive * published[-1], published, atol=6e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_lloyd_max_level_is_the_mean_of_its_cell(bits: int) -> None:
    drawn = np.random.default_rng(0).standard_normal(2_000_000)
    levels = np.array(lloyd_max_levels(bits))
    # The levels are known up to one factor: the one of least squared error.
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2 * LARGEST_LLOYD_MAX[bits], drawn)
    means = np.array([drawn[nearest == k].mean() for k in range(2**bits)])
    np.testing.assert_allclose(means, levels * LARGEST_LLOYD_MAX[bits], atol=0.01)


def test_fp4_is_e2m1() -> None:
    magnitudes = [2.0**exponent * (1 + mantissa / 2) for exponent in range(3) for mantissa in range(2)]
    positive = np.array([0.5, *magnitudes]) / 6  # 0.5 is the one number without an exponent
    expected = [*-positive[::-1], 0, *positive]
    np.testing.assert_array_equal(get_format("fp4").levels, np.array(expected, dtype=np.float32))


def test_a_number_of_bits_stands_for_the_format_of_least_error() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    for bits, best in BEST_FORMATS.items():
        assert get_format(bits).name == best
        assert get_format(bits).bits == bits
    error = {name: float((weight - quantize(weight, name).dequantize()).norm()) for name in format_names()}
    for bits in (2, 3):
        assert error[BEST_FORMATS[bits]] == min(error[n] for n in error if get_format(n).bits == bits)
    with pytest.raises(QuantError, match="5 bits"):
        get_format(5)


@pytest.mark.parametrize("name", format_names())
def test_every_format_is_a_codebook_of_its_bits(name: str) -> None:
    levels = get_format(name).levels
    assert levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert levels[0] == -1
    assert levels[-1] == 1
    assert levels.numel() <= 2 ** get_format(name).bits


@pytest.mark.parametrize("name", format_names())
@given(seed=st.integers(0, 2**32 - 1))
def test_nearest_is_the_binary_search_of_the_midpoints(name: str, seed: int) -> None:
    levels = get_format(name).levels.numpy()
    midpoints = (levels[1:] + levels[:-1]) / 2
    beside = [np.nextafter(midpoints, np.float32(side)) for side in (-2, 2)]
    drawn = np.random.default_rng(seed).uniform(-1, 1, 300).astype(np.float32)
    scaled = np.concatenate([drawn, levels, midpoints, *beside])
    found = get_format(name).nearest(torch.from_numpy(scaled))
    np.testing.assert_array_equal(found.numpy(), np.searchsorted(midpoints, scaled))


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(QuantError, match="nf5") as caught:
        get_format("nf5")
    assert all(name in caught.value.remedy for name in format_names())
    assert str(caught.value) == f"{caught.value.problem}\n  → {caught.value.remedy}"


def test_a_new_format_is_one_function_and_a_taken_name_is_refused() -> None:
    try:
        fresh = register_format("int5", bits=8)(lambda: symmetric_levels(15))
        assert get_format("int5") is fresh
        with pytest.raises(QuantError, match="registered already"):
            register_format("int5", bits=8)(lambda: symmetric_levels(15))
    finally:
        del FORMATS["int5"]


@pytest.mark.parametrize(
    ("levels", "bits", "match"),
    [
        ([0.0, 0.0, 1.0], 2, "not a codebook"),
        ([-2.0, 1.0], 2, "not a codebook"),
        (symmetric_levels(2), 2, "5 levels"),
        ([0.0], 2, "not a codebook"),
        ([0.0, 1e-5, 2e-5, 1.0], 2, "closer"),
        ([0.0, 1.0], 5, "5 bits"),
    ],
)
def test_what_is_no_codebook_is_refused(levels: list[float], bits: int, match: str) -> None:
    with pytest.raises(QuantError, match=match):
        register_format("refused", bits=bits)(lambda: levels)
    assert "refused" not in format_names()
