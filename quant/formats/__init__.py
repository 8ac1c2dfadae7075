"""The number formats; each file registers its own, and a new one is one more file or one function of a user's."""

from __future__ import annotations

from quant.formats import fp4, lloyd_max, normal_float, uniform

__all__ = ["fp4", "lloyd_max", "normal_float", "uniform"]
