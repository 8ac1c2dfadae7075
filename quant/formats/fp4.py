"""Four-bit floating point: a sign, two exponent bits and one mantissa bit (E2M1 of the OCP MX specification 1.0)."""

from __future__ import annotations

from quant.codebooks import register_format


@register_format("fp4", bits=4)
def _fp4() -> list[float]:
    magnitudes = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    positive = [magnitude / magnitudes[-1] for magnitude in magnitudes]
    return [*(-level for level in reversed(positive)), 0.0, *positive]
