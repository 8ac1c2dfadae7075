"""The codes of a packed weight in the file: of 2, 4 and 8 bits as they are, of 3 bits as a plane of 2 and one of 1."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.export.graph_writer import GraphWriter
from graphprune.export.packed_matrix import PackedMatrix, pack

PLANES_SHIFT = 4
"""A 3-bit code c is unpacked to the 4-bit code c + 4: its high bit decides between 4 and 8, its low bits are added."""


def stored_codes(writer: GraphWriter, weight: PackedMatrix, shift: int, *, low_first: bool) -> ir.Value:
    """Return uint8 (bytes,): `codes + shift`, in `weight.bits` bits each, packed in flat order.

    Args:
        writer: Where initializers and nodes go.
        weight: The weight; of 3 bits, its size is a multiple of 8.
        shift: What is added to every code; for 3-bit codes 4, or 5 if none is 7.
        low_first: Whether a byte's first code lies in its lowest bits.
    """
    if weight.stored_bits != 3:
        return writer.initializer(
            f"{weight.name}.codes", lambda: pack(_shifted(weight, shift), weight.bits, low_first=low_first)
        )
    codes = _shifted(weight, shift - PLANES_SHIFT)
    low = writer.initializer(f"{weight.name}.codes_low", lambda: pack(codes & np.uint8(3), 2))
    high = writer.initializer(f"{weight.name}.codes_high", lambda: pack(codes >> np.uint8(2), 1))
    return writer.node(
        "BitwiseOr",
        [
            nibbles(writer, low, (0, 1, 2, 3), low_first=low_first),
            nibbles(writer, high, (PLANES_SHIFT, 2 * PLANES_SHIFT), low_first=low_first),
        ],
    )


def codebook_codes(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Return uint8 (bytes,): the codes as `byte_table` takes them, a byte's first in its highest bits."""
    return stored_codes(writer, weight, _codebook_shift(weight), low_first=False)


def byte_table(
    writer: GraphWriter, weight: PackedMatrix, values: npt.NDArray[np.int64 | np.float32], table: str
) -> ir.Value:
    """Return the initializer of what each byte stands for, (256, weights a byte); one for each codebook."""
    name = f"{table}.{len(weight.levels)}levels.{zlib.crc32(weight.levels.tobytes()):08x}"
    return writer.initializer(name, lambda: _byte_table(values, weight.bits, _codebook_shift(weight)))


def expanded(
    writer: GraphWriter, weight: PackedMatrix, values: npt.NDArray[np.int64 | np.float32], table: str
) -> ir.Value:
    """Look up all packed bytes: (bytes, weights a byte), of `values` indexed by code."""
    indices = as_indices(writer, codebook_codes(writer, weight))
    return writer.node("Gather", [byte_table(writer, weight, values, table), indices], axis=0)


def nibbles(writer: GraphWriter, plane: ir.Value, values: tuple[int, ...], *, low_first: bool) -> ir.Value:
    """Spread packed codes of 1 or 2 bits to 4 bits each, every code replaced by its value: uint8 (bytes,).

    Args:
        writer: Where the nodes go.
        plane: uint8 (bytes,), a byte's first code in its highest bits.
        values: Two or four numbers below 16.
        low_first: Whether the result has a byte's first code in its lowest bits.
    """
    name = f"table.nibbles.{'.'.join(map(str, values))}.{'low' if low_first else 'high'}_first"
    table = writer.initializer(name, lambda: _nibble_table(values, low_first=low_first))
    rows = writer.node("Gather", [table, as_indices(writer, plane)], axis=0)
    return writer.node("Reshape", [rows, writer.integers(-1)])


def as_indices(writer: GraphWriter, codes: ir.Value) -> ir.Value:
    """Return bytes as what a Gather takes."""
    return writer.node("Cast", [codes], to=ir.DataType.INT32.value)


def _shifted(weight: PackedMatrix, shift: int) -> npt.NDArray[np.uint8]:
    return (weight.codes.reshape(-1) + np.uint8(shift)).astype(np.uint8)


def _codebook_shift(weight: PackedMatrix) -> int:
    return PLANES_SHIFT if weight.stored_bits == 3 else 0


def _byte_table(
    values: npt.NDArray[np.int64 | np.float32], bits: int, shift: int
) -> npt.NDArray[np.uint8 | np.float32]:
    """Return for each byte the values of the codes that it packs, first code first: (256, codes a byte)."""
    places = np.arange(8 - bits, -1, -bits)
    codes = (np.arange(256)[:, None] >> places) & (2**bits - 1)
    table = values[np.clip(codes - shift, 0, len(values) - 1)]
    return table.astype(np.float32 if values.dtype == np.float32 else np.uint8)


def _nibble_table(values: tuple[int, ...], *, low_first: bool) -> npt.NDArray[np.uint8]:
    """Return for each byte the bytes of the values that its codes stand for, two a byte."""
    bits = {2: 1, 4: 2}[len(values)]
    places = np.arange(8 - bits, -1, -bits)
    codes = (np.arange(256)[:, None] >> places) & (2**bits - 1)
    spread = np.array(values, dtype=np.uint8)[codes]
    first, second = spread[:, ::2], spread[:, 1::2]
    return (first | second << 4 if low_first else first << 4 | second).astype(np.uint8)
