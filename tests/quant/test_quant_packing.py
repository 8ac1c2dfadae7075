"""Packing: nothing is lost, nothing is wasted, and the order of the bits is the documented one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant import QuantError, pack, unpack
from quant.packing import packed_size, symbols

BITS = (2, 3, 4, 8)


def bit_string(codes: np.ndarray, bits: int) -> np.ndarray:
    """Write the codes as one string of bits, cut into bytes: the format's definition, slowly."""
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    return np.array([int(text[i : i + 8], 2) for i in range(0, len(text), 8)], dtype=np.uint8)


@given(bits=st.sampled_from(BITS), count=st.integers(0, 67), seed=st.integers(0, 2**32 - 1))
def test_packing_is_the_bit_string_and_unpacking_undoes_it(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.numel() == packed_size(count, bits) == -(-count * bits // 8)
    np.testing.assert_array_equal(packed.numpy(), bit_string(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits, count).numpy(), codes)


def test_the_first_code_is_in_the_high_nibble() -> None:
    assert pack(torch.tensor([0xA, 0x3, 0xF], dtype=torch.uint8), 4).tolist() == [0xA3, 0xF0]


def test_the_first_of_four_codes_is_in_the_highest_bits() -> None:
    assert pack(torch.tensor([3, 0, 1, 2], dtype=torch.uint8), 2).tolist() == [0b11000110]


def test_eight_codes_of_three_bits_fill_three_bytes() -> None:
    assert pack(torch.arange(8, dtype=torch.uint8), 3).tolist() == [0b00000101, 0b00111001, 0b01110111]


@given(bits=st.sampled_from(BITS), count=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_symbols_hold_the_codes_in_order(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8)
    width = 12 if bits == 3 else 8
    text = "".join(
        f"{symbol:0{width}b}" for symbol in symbols(pack(torch.from_numpy(codes), bits), bits).tolist()
    )
    assert [int(text[i * bits : (i + 1) * bits], 2) for i in range(count)] == codes.tolist()


@pytest.mark.parametrize("codes", [torch.tensor([4], dtype=torch.uint8), torch.tensor([1])])
def test_codes_that_do_not_fit_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(QuantError, match="do not fit into 2 bits"):
        pack(codes, 2)


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(QuantError, match="fill 2 bytes, not 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 4)


def test_a_width_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(QuantError, match="5 bits"):
        pack(torch.zeros(1, dtype=torch.uint8), 5)
