"""Evenly spaced levels: symmetric about zero (`int2` to `int8`), or over a block's own range (`uint2` to `uint8`)."""

from __future__ import annotations

from quant.codebooks import register_format


def symmetric_levels(largest: int) -> list[float]:
    """Return the grid ``k / largest`` for k from -largest to largest, zero among them."""
    return [k / largest for k in range(-largest, largest + 1)]


def even_levels(bits: int) -> list[float]:
    """Return ``2 ** bits`` evenly spaced levels from -1 to 1."""
    steps = 2**bits - 1
    return [(2 * k - steps) / steps for k in range(steps + 1)]


@register_format("int8", bits=8)
def _int8() -> list[float]:
    return symmetric_levels(127)


@register_format("int4", bits=4)
def _int4() -> list[float]:
    return symmetric_levels(7)


@register_format("int3", bits=3)
def _int3() -> list[float]:
    return symmetric_levels(3)


@register_format("int2", bits=2)
def _int2() -> list[float]:
    return symmetric_levels(1)


@register_format("uint8", bits=8, affine=True)
def _uint8() -> list[float]:
    return even_levels(8)


@register_format("uint4", bits=4, affine=True)
def _uint4() -> list[float]:
    return even_levels(4)


@register_format("uint3", bits=3, affine=True, fitted=True)
def _uint3() -> list[float]:
    return even_levels(3)


@register_format("uint2", bits=2, affine=True, fitted=True)
def _uint2() -> list[float]:
    return even_levels(2)
