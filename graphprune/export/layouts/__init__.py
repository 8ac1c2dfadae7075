"""The ONNX forms of `x @ weight.T` for a packed weight; a new form is one file here and one name in `PROFILES`.

| layout | operators | what it holds | speed on a CPU |
| --- | --- | --- | --- |
| grid | MatMulNBits, block sums | evenly spaced levels (int2 to int8, uint2 to uint8), exactly | fast |
| byte_table | Gather, MatMulNBits | codebooks of up to 4 bits, their levels rounded to 8 bits | fast |
| bnb4 | MatMulBnb4 | codebooks within NF4, exactly, blocks that cross rows too | slow |
| dequantize | Gather, DequantizeLinear, MatMul | as grid and byte_table, by standard operators | fast |
| unpacked | Gather, Mul, MatMul | anything, exactly; float32 in memory | as float32 |
"""

from graphprune.export.layouts import bnb4, byte_table, dequantize, grid, unpacked
from graphprune.export.layouts.byte_table import rounded_levels
from graphprune.export.layouts.registry import (
    LAYOUTS,
    PROFILES,
    Layout,
    Profile,
    check_profile,
    choose_layout,
)

__all__ = [
    "LAYOUTS",
    "PROFILES",
    "Layout",
    "Profile",
    "bnb4",
    "byte_table",
    "check_profile",
    "choose_layout",
    "dequantize",
    "grid",
    "rounded_levels",
    "unpacked",
]
