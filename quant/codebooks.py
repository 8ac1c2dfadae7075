"""The number formats: for each a sorted list of levels in [-1, 1] that a block's scaled weights may take.

A new format is one decorated function:

    @register_format("int5", bits=8)
    def _int5() -> list[float]:
        return uniform_levels(15)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

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
        symbol_values: float32 (symbols, codes a symbol): the levels that a packed symbol stands for.
    """

    name: str
    bits: int
    levels: Tensor
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


def register_format(name: str, *, bits: int) -> Callable[[Callable[[], Sequence[float]]], Format]:
    """Register the levels that the decorated function returns as a format.

    Args:
        name: The name that `quantize` and recipes use.
        bits: Storage bits of a code: 2, 3, 4 or 8.

    Returns:
        A decorator that puts the finished `Format` in the function's place.

    Raises:
        QuantError: The name is taken, or the levels are not a codebook.
    """

    def decorate(levels: Callable[[], Sequence[float]]) -> Format:
        if name in FORMATS:
            raise QuantError(f"the format {name!r} is registered already", "choose another name")
        FORMATS[name] = Format(name=name, bits=bits, levels=torch.tensor(levels(), dtype=torch.float32))
        return FORMATS[name]

    return decorate


def get_format(name: str) -> Format:
    """Return the format of this name.

    Raises:
        QuantError: There is none; the message lists those that there are.
    """
    if name not in FORMATS:
        raise QuantError(f"there is no format {name!r}", f"use one of {', '.join(format_names())}")
    return FORMATS[name]


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, sorted."""
    return tuple(sorted(FORMATS))


def normal_float_levels(bits: int) -> list[float]:
    """Return NormalFloat's levels: normal quantiles, one more above zero than below, zero among them.

    Source: QLoRA (arXiv 2305.14314) section 3, as bitsandbytes' `create_normal_map` computes it; the
    outermost quantile, chosen there for 4 bits, is kept for all widths as in LoftQ's code.
    """
    outermost = 0.9677083  # 1 - (1 / 30 + 1 / 32) / 2, in the digits that bitsandbytes keeps of it
    positive, negative = 2 ** (bits - 1), 2 ** (bits - 1) - 1

    def quantiles(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [NormalDist().inv_cdf(outermost - step * i) for i in range(count)]

    levels = sorted([*quantiles(positive), 0.0, *(-quantile for quantile in quantiles(negative))])
    return [level / levels[-1] for level in levels]


def uniform_levels(largest: int) -> list[float]:
    """Return the symmetric grid ``k / largest`` for k from -largest to largest."""
    return [k / largest for k in range(-largest, largest + 1)]


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


@register_format("nf4", bits=4)
def _nf4() -> list[float]:
    # bitsandbytes' published table: its float32 rounding differs from the definition by up to 1.2e-7, and
    # packed weights are only exchangeable bit for bit with the very same numbers.
    return [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip


@register_format("nf3", bits=3)
def _nf3() -> list[float]:
    return normal_float_levels(3)


@register_format("nf2", bits=2)
def _nf2() -> list[float]:
    return normal_float_levels(2)


@register_format("int8", bits=8)
def _int8() -> list[float]:
    return uniform_levels(127)


@register_format("int4", bits=4)
def _int4() -> list[float]:
    return uniform_levels(7)


@register_format("int3", bits=3)
def _int3() -> list[float]:
    return uniform_levels(3)


@register_format("int2", bits=2)
def _int2() -> list[float]:
    return uniform_levels(1)
