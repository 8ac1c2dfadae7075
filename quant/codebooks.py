"""A number format: a sorted list of levels in [-1, 1] that a block's scaled weights may take.

A new format is one decorated function:

    @register_format("int5", bits=8)
    def _int5() -> list[float]:
        return [k / 15 for k in range(-15, 16)]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.packing import check_bits, symbol_bits

# A power of two, so that a scaled weight times it is exact and the cell of a weight is never off by one.
CELLS_PER_UNIT = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Format:
    """A codebook; code ``i`` stands for ``levels[i]``.

    Attributes:
        name: The key in the registry.
        bits: Storage bits of a code: 2, 3, 4 or 8.
        levels: float32 (levels,), ascending, within [-1, 1].
        affine: Whether a block has an offset beside its scale: a weight is ``level * scale + offset``.
        fitted: Whether a block's scale is by default the one of least squared error, not the largest weight.
        symbol_values: float32 (symbols, codes a symbol): the levels that a packed symbol stands for.
    """

    name: str
    bits: int
    levels: Tensor
    affine: bool = False
    fitted: bool = False
    symbol_values: Tensor = field(init=False, repr=False)
    _cell_code: Tensor = field(init=False, repr=False)
    _cell_midpoint: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_levels(self)
        object.__setattr__(self, "symbol_values", _symbol_values(self))
        cell_code, cell_midpoint = _cells(self)
        object.__setattr__(self, "_cell_code", cell_code)
        object.__setattr__(self, "_cell_midpoint", cell_midpoint)

    def nearest(self, scaled: Tensor) -> Tensor:
        """Return the code of the nearest level; on a tie the lower one.

        [-1, 1] is cut into cells so narrow that each holds at most one midpoint of two levels, so one look-up
        and one comparison give exactly what a binary search of the midpoints gives, several times faster.

        Args:
            scaled: float32 within [-1, 1], any shape.

        Returns:
            uint8 codes of the same shape.
        """
        flat = scaled.reshape(-1)
        cell = (flat * CELLS_PER_UNIT).floor_().to(torch.int32).add_(CELLS_PER_UNIT)
        code = self._cell_code.to(flat.device).index_select(0, cell)
        code += flat > self._cell_midpoint.to(flat.device).index_select(0, cell)
        return code.view(scaled.shape)


FORMATS: dict[str, Format] = {}


def register_format(
    name: str, *, bits: int, affine: bool = False, fitted: bool = False
) -> Callable[[Callable[[], Sequence[float]]], Format]:
    """Register the levels that the decorated function returns as a format.

    Args:
        name: The name that `quantize` and recipes use.
        bits: Storage bits of a code: 2, 3, 4 or 8.
        affine: Whether a block has an offset beside its scale.
        fitted: Whether a block's scale is by default fitted by least squares.

    Returns:
        A decorator that puts the finished `Format` in the function's place.

    Raises:
        QuantError: The name is taken, or the levels are not a codebook.
    """

    def decorate(levels: Callable[[], Sequence[float]]) -> Format:
        if name in FORMATS:
            raise QuantError(f"the format {name!r} is registered already", "choose another name")
        table = torch.tensor(levels(), dtype=torch.float32)
        FORMATS[name] = Format(name=name, bits=bits, levels=table, affine=affine, fitted=fitted)
        return FORMATS[name]

    return decorate


BEST_FORMATS = {2: "uint2", 3: "uint3", 4: "nf4", 8: "int8"}
"""The format that a number of bits alone stands for."""


def get_format(name: str | int) -> Format:
    """Return the format of this name, or the best one of this many bits.

    Raises:
        QuantError: There is none; the message lists those that there are.
    """
    found = FORMATS.get(BEST_FORMATS.get(name, "") if isinstance(name, int) else name)
    if found is None:
        which = f"of {name} bits" if isinstance(name, int) else repr(name)
        raise QuantError(f"there is no format {which}", f"use one of {', '.join(format_names())}")
    return found


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, sorted."""
    return tuple(sorted(FORMATS))


def _check_levels(format: Format) -> None:
    check_bits(format.bits)
    levels = format.levels
    sorted_within = bool((levels.diff() > 0).all()) and bool((levels.abs() <= 1).all())
    if not sorted_within or not 2 <= levels.numel() <= 2**format.bits:
        raise QuantError(
            f"the {levels.numel()} levels of {format.name!r} are not a codebook of {format.bits} bits",
            f"give 2 to {2**format.bits} ascending levels within [-1, 1]",
        )


def _symbol_values(format: Format) -> Tensor:
    """Return the levels of every symbol; codes beyond the last level, which nothing writes, read as it."""
    width = symbol_bits(format.bits)
    codes_per_symbol = width // format.bits
    symbol = torch.arange(2**width).unsqueeze(1)
    shifts = torch.arange(codes_per_symbol - 1, -1, -1) * format.bits
    codes = (symbol >> shifts) & (2**format.bits - 1)
    return format.levels[codes.clamp(max=format.levels.numel() - 1)].contiguous()


def _cells(format: Format) -> tuple[Tensor, Tensor]:
    """Return for each cell of `Format.nearest` the code at its lower edge and the next midpoint."""
    midpoints = (format.levels[1:] + format.levels[:-1]) / 2
    if (midpoints * CELLS_PER_UNIT).floor().diff().eq(0).any():
        raise QuantError(
            f"two levels of {format.name!r} are closer than {1 / CELLS_PER_UNIT}", "space the levels wider"
        )
    edges = torch.arange(-CELLS_PER_UNIT, CELLS_PER_UNIT + 1) / CELLS_PER_UNIT
    code = torch.bucketize(edges, midpoints)
    return code.to(torch.uint8), torch.cat([midpoints, torch.tensor([torch.inf])])[code]
