"""NormalFloat: levels at the quantiles of a normal distribution (QLoRA, arXiv 2305.14314, section 3)."""

from __future__ import annotations

from statistics import NormalDist

from quant.codebooks import register_format


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
