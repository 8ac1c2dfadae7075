"""The ONNX forms of `x @ weight.T` for a packed weight; a new form is one decorated function.

| layout | operator | what it holds | speed on a CPU |
| --- | --- | --- | --- |
| grid | MatMulNBits | evenly spaced levels (int2 to int8), exactly | fast |
| byte_table | Gather, MatMulNBits | codebooks of 2 or 4 bits, their levels rounded to 8 bits | fast |
| bnb4 | MatMulBnb4 | codebooks within NF4, exactly, blocks that cross rows too | slow |
| unpacked | Gather, Mul, MatMul | anything, exactly; float32 in memory | as float32 |
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import MICROSOFT, GraphWriter
from graphprune.export.packed_matrix import PackedMatrix, pack
from quant import get_format

# Activations are rounded to int8 a block at a time: with 8-bit weights that error would dominate at 64.
LARGEST_BLOCK_8_BITS = 32

Write = Callable[[GraphWriter, ir.Value, PackedMatrix], ir.Value]
Fits = Callable[[PackedMatrix], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One ONNX form of a packed weight.

    Attributes:
        name: Key in `LAYOUTS`.
        exact: Whether the file holds the quantized weights themselves and not rounded ones.
        fits: Whether a weight can take this form.
        write: Adds the nodes that compute `x @ weight.T` and returns their output.
    """

    name: str
    exact: bool
    fits: Fits
    write: Write


LAYOUTS: dict[str, Layout] = {}
"""All layouts, the preferred first."""


def layout(name: str, *, exact: bool, fits: Fits) -> Callable[[Write], Write]:
    """Register the decorated function as a `Layout`."""

    def decorate(write: Write) -> Write:
        LAYOUTS[name] = Layout(name=name, exact=exact, fits=fits, write=write)
        return write

    return decorate


def choose_layout(weight: PackedMatrix, *, exact: bool = False) -> Layout:
    """Return the first layout that fits the weight, among the exact ones alone if asked."""
    return next(form for form in LAYOUTS.values() if form.fits(weight) and (form.exact or not exact))


@layout(
    "grid",
    exact=True,
    fits=lambda weight: weight.offset is None and weight.grid is not None and weight.block() is not None,
)
def write_grid(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """MatMulNBits on the codes: level k / m is stored as k + 2^(bits - 1), and the scale is absmax / m."""
    block = grid_block(weight)
    codes = grid_codes(writer, weight)
    shape = writer.integers(weight.out_features, weight.in_features // block, block * weight.bits // 8)
    scales = grid_scales(writer, weight)
    return _matmul_n_bits(
        writer, x, writer.node("Reshape", [codes, shape]), scales, weight, weight.bits, block
    )


@layout(
    "byte_table",
    exact=False,
    fits=lambda weight: weight.offset is None and weight.bits < 8 and weight.block() is not None,
)
def write_byte_table(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """MatMulNBits on 8-bit codes that a session makes of the packed ones when it loads the file.

    Each packed byte is an index into a table of the 8-bit codes of its 2 or 4 weights.
    """
    block = weight.block()
    if block is None:
        raise ExportError(f"{weight.name}: no block fits its rows", "use another layout")
    denominator = byte_denominator(tuple(weight.levels.tolist()))
    values = expanded(writer, weight, byte_levels(weight.levels) + 128, "table.uint8")
    shape = writer.integers(weight.out_features, weight.in_features // block, block)
    codes = writer.node("Reshape", [values, shape])
    scales = writer.initializer(
        f"{weight.name}.scales", lambda: weight.row_scales(block) / np.float32(denominator)
    )
    return _matmul_n_bits(writer, x, codes, scales, weight, 8, block)


@layout("bnb4", exact=True, fits=lambda weight: weight.offset is None and _nf4_codes(weight) is not None)
def write_bnb4(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """MatMulBnb4 with NF4's own table; flat blocks may cross rows."""
    nf4_codes = _nf4_codes(weight)
    if nf4_codes is None:
        raise ExportError(f"{weight.name}: its levels are not NF4's", "use another layout")
    name = "codes" if np.array_equal(nf4_codes, np.arange(16)) else "nf4_codes"
    codes = writer.initializer(f"{weight.name}.{name}", lambda: pack(nf4_codes[weight.codes].reshape(-1), 4))
    absmax = writer.initializer(f"{weight.name}.absmax", lambda: weight.absmax)
    return writer.node(
        "MatMulBnb4",
        [x, codes, absmax],
        domain=MICROSOFT,
        K=weight.in_features,
        N=weight.out_features,
        block_size=weight.block_size,
        quant_type=1,
    )


@layout("unpacked", exact=True, fits=lambda weight: True)
def write_unpacked(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """MatMul on float32 weights that a session makes of the packed ones when it loads the file."""
    return writer.node("MatMul", [x, writer.node("Transpose", [unpacked(writer, weight)], perm=[1, 0])])


def unpacked(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Add the nodes that compute the float32 matrix (out_features, in_features)."""
    size, blocks, block = weight.codes.size, len(weight.absmax), weight.block_size
    missing = blocks * block - size
    # The last block may be incomplete: fill it up with code 0, and cut off after scaling.
    whole = replace(
        weight,
        name=f"{weight.name}.padded" if missing else weight.name,
        codes=np.pad(weight.codes.reshape(1, -1), ((0, 0), (0, missing))),
    )
    values = expanded(writer, whole, weight.levels, "table.float")
    scaled = writer.node("Reshape", [values, writer.integers(blocks, block)])
    for operator, each, part in (("Mul", weight.absmax, "absmax"), ("Add", weight.offset, "offset")):
        if each is not None:
            column = writer.initializer(f"{weight.name}.{part}", partial(np.asarray, each))
            scaled = writer.node(operator, [scaled, writer.node("Unsqueeze", [column, writer.integers(1)])])
    flat = writer.node("Reshape", [scaled, writer.integers(-1)])
    cut = writer.node("Slice", [flat, writer.integers(0), writer.integers(size), writer.integers(0)])
    return writer.node("Reshape", [cut, writer.integers(weight.out_features, weight.in_features)])


def grid_block(weight: PackedMatrix) -> int:
    """Return the kernel block of a grid weight.

    Raises:
        ExportError: If no kernel block fits its rows.
    """
    block = weight.block(LARGEST_BLOCK_8_BITS) if weight.bits == 8 else weight.block()
    if block is None or weight.grid is None:
        raise ExportError(f"{weight.name}: not a grid, or no block fits its rows", "use another layout")
    return block


def grid_codes(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Return the initializer of `k + 2^(bits - 1)`, uint8 (out_features, in_features * bits / 8)."""

    def make() -> npt.NDArray[np.uint8]:
        offsets = np.round(weight.levels * np.float64(weight.grid or 1)).astype(np.int64) + 2 ** (
            weight.bits - 1
        )
        codes = offsets.astype(np.uint8)[weight.codes].reshape(-1)
        return pack(codes, weight.bits, low_first=True).reshape(weight.out_features, -1)

    return writer.initializer(f"{weight.name}.codes", make)


def grid_scales(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Return the initializer of `absmax / m`, float32 (out_features, in_features / block)."""
    divisor = np.float32(weight.grid or 1)
    return writer.initializer(
        f"{weight.name}.scales", lambda: weight.row_scales(grid_block(weight)) / divisor
    )


@lru_cache
def byte_denominator(levels: tuple[float, ...]) -> int:
    """Return the d up to 127 whose multiples of 1 / d are nearest to the levels; 123 for NF4, 74 for NF2."""
    exact = np.array(levels, dtype=np.float64)
    return min(range(1, 128), key=lambda d: float(np.abs(np.round(exact * d) / d - exact).max()))


def byte_levels(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the integers k for which `k / byte_denominator` is nearest to each level."""
    return np.round(levels.astype(np.float64) * byte_denominator(tuple(levels.tolist()))).astype(np.int64)


def expanded(
    writer: GraphWriter, weight: PackedMatrix, values: npt.NDArray[np.int64 | np.float32], table: str
) -> ir.Value:
    """Look up all packed bytes: (bytes, weights a byte), of `values` indexed by code."""
    codes = writer.initializer(f"{weight.name}.codes", weight.packed_high_first)
    return writer.node(
        "Gather", [byte_table(writer, weight, values, table), _as_indices(writer, codes)], axis=0
    )


def byte_table(
    writer: GraphWriter, weight: PackedMatrix, values: npt.NDArray[np.int64 | np.float32], table: str
) -> ir.Value:
    """Return the initializer of what each byte stands for, (256, weights a byte); one for each codebook."""
    name = f"{table}.{len(weight.levels)}levels.{zlib.crc32(weight.levels.tobytes()):08x}"
    return writer.initializer(name, lambda: _byte_table(values, weight.bits))


def _as_indices(writer: GraphWriter, codes: ir.Value) -> ir.Value:
    return writer.node("Cast", [codes], to=ir.DataType.INT32.value)


def rounded_levels(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the levels that the byte table's grid has nearest to the given ones."""
    return (byte_levels(levels) / byte_denominator(tuple(levels.tolist()))).astype(np.float32)


def _matmul_n_bits(
    writer: GraphWriter,
    x: ir.Value,
    codes: ir.Value,
    scales: ir.Value,
    weight: PackedMatrix,
    bits: int,
    block: int,
) -> ir.Value:
    # Level 4 rounds activations to int8; without it the 2- and 8-bit kernels are 20 to 70 times slower.
    return writer.node(
        "MatMulNBits",
        [x, codes, scales],
        domain=MICROSOFT,
        K=weight.in_features,
        N=weight.out_features,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )


def _byte_table(values: npt.NDArray[np.int64 | np.float32], bits: int) -> npt.NDArray[np.uint8 | np.float32]:
    """Return for each byte the values of the codes that it packs, first code first: (256, codes a byte)."""
    shifts = np.arange(8 - bits, -1, -bits)
    codes = (np.arange(256)[:, None] >> shifts) & (2**bits - 1)
    table = values[np.minimum(codes, len(values) - 1)]
    return table.astype(np.float32 if values.dtype == np.float32 else np.uint8)


def _nf4_codes(weight: PackedMatrix) -> npt.NDArray[np.uint8] | None:
    """Return NF4's code for each level, or None if a level is not one of NF4's."""
    nf4 = get_format("nf4").levels.numpy()
    nearest = np.abs(weight.levels[:, None] - nf4).argmin(axis=1)
    # NF2's levels by definition differ from NF4's published table in the last bit.
    same = np.abs(weight.levels - nf4[nearest]) <= np.spacing(np.float32(1))
    return nearest.astype(np.uint8) if same.all() else None
