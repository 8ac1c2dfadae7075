"""Codes of 2, 3, 4 or 8 bits laid end to end in bytes, the first code in the highest bits.

At 4 bits this is the order of bitsandbytes and of ONNX Runtime's MatMulBnb4 (even flat index in the high
nibble); at 3 bits eight codes fill three bytes. The last byte is filled up with zero bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from quant.errors import QuantError


def check_bits(bits: int) -> None:
    """Raise QuantError unless codes of this width can be packed."""
    if bits not in (2, 3, 4, 8):
        raise QuantError(f"codes of {bits} bits cannot be packed", "use 2, 3, 4 or 8 bits")


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes `count` codes of `bits` bits fill."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, row-major, into bytes.

    Args:
        codes: uint8, any shape, each below ``2 ** bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8, 1-D, of `packed_size` bytes.

    Raises:
        QuantError: The codes are not uint8 or do not fit into `bits` bits.
    """
    group_codes, group_bytes = _group(bits)
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) >= 2**bits):
        raise QuantError(
            f"the codes ({codes.dtype}) do not fit into {bits} bits",
            f"pass uint8 codes from 0 to {2**bits - 1}",
        )
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    rows = _rows(flat, group_codes).to(_word_dtype(group_bytes))
    word = rows[:, 0]
    for column in range(1, group_codes):
        word = (word << bits) | rows[:, column]
    shifts = [8 * (group_bytes - 1 - byte) for byte in range(group_bytes)]
    packed = torch.stack([((word >> shift) & 0xFF).to(torch.uint8) for shift in shifts], dim=1)
    return packed.reshape(-1)[: packed_size(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` codes that `pack` wrote.

    Args:
        packed: uint8, 1-D, of exactly `packed_size` bytes.
        bits: 2, 3, 4 or 8.
        count: How many codes there are.

    Returns:
        uint8, 1-D, of `count` codes.

    Raises:
        QuantError: The number of bytes is not the one that `count` codes fill.
    """
    group_codes, group_bytes = _group(bits)
    if packed.numel() != packed_size(count, bits):
        raise QuantError(
            f"{count} codes of {bits} bits fill {packed_size(count, bits)} bytes, not {packed.numel()}",
            "pass the bytes that pack() returned, whole",
        )
    if bits == 8:
        return packed.clone()
    rows = _rows(packed, group_bytes).to(_word_dtype(group_bytes))
    word = rows[:, 0]
    for column in range(1, group_bytes):
        word = (word << 8) | rows[:, column]
    shifts = [bits * (group_codes - 1 - code) for code in range(group_codes)]
    codes = torch.stack([((word >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts], dim=1)
    return codes.reshape(-1)[:count].clone()


def symbol_bits(bits: int) -> int:
    """Return the width of the symbols that `symbols` cuts packed bytes into: 12 for 3 bits, else 8."""
    return 12 if bits == 3 else 8


def symbols(packed: Tensor, bits: int) -> Tensor:
    """Cut packed bytes into whole-code symbols, to be looked up in a table of all their values.

    Args:
        packed: uint8, 1-D.
        bits: 2, 3, 4 or 8.

    Returns:
        int32, 1-D: each byte, or for 3 bits each half of three bytes (12 bits, four codes).
    """
    if symbol_bits(bits) == 8:
        return packed.to(torch.int32)
    first, middle, last = _rows(packed, 3).to(torch.int32).unbind(1)
    return torch.stack([(first << 4) | (middle >> 4), ((middle & 0xF) << 8) | last], dim=1).reshape(-1)


def _group(bits: int) -> tuple[int, int]:
    """Return the smallest number of codes that fill whole bytes, and how many bytes they fill."""
    check_bits(bits)
    group_bits = math.lcm(bits, 8)
    return group_bits // bits, group_bits // 8


def _word_dtype(group_bytes: int) -> torch.dtype:
    return torch.uint8 if group_bytes == 1 else torch.int32


def _rows(flat: Tensor, width: int) -> Tensor:
    """Return `flat` as rows of `width`, the last one filled up with zeros."""
    return functional.pad(flat, (0, -flat.numel() % width)).view(-1, width)
