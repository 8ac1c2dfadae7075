"""Low-bit weights in PyTorch: codebooks, packing, LoftQ, and layers that train adapters over packed weights.

Stands alone: it needs torch alone, safetensors to save and load, and nothing of graphprune.
"""

from __future__ import annotations

from quant import formats, ternary
from quant.apply import LayerReport, loftq_model
from quant.blockwise import quantize
from quant.calibration import collect_covariances
from quant.codebooks import Format, format_names, get_format, register_format
from quant.config import LoftQConfig, Reconstruction
from quant.covariance import InputNorm
from quant.embedding import QuantEmbedding
from quant.errors import QuantError
from quant.linear import QuantLinear
from quant.loftq import LoftQResult, loftq
from quant.mix import Mix, mix_for_bits, mix_for_budget, paper_mix
from quant.packed import cache_dequantized
from quant.packing import pack, unpack
from quant.parameters import PackedParameter, loftq_parameter_, pack_parameter_
from quant.quantized import QuantizedTensor
from quant.scales import Scales
from quant.storage import load_quantized_, save_quantized

__all__ = [
    "Format",
    "InputNorm",
    "LayerReport",
    "LoftQConfig",
    "LoftQResult",
    "Mix",
    "PackedParameter",
    "QuantEmbedding",
    "QuantError",
    "QuantLinear",
    "QuantizedTensor",
    "Reconstruction",
    "Scales",
    "cache_dequantized",
    "collect_covariances",
    "format_names",
    "formats",
    "get_format",
    "load_quantized_",
    "loftq",
    "loftq_model",
    "loftq_parameter_",
    "mix_for_bits",
    "mix_for_budget",
    "pack",
    "pack_parameter_",
    "paper_mix",
    "quantize",
    "register_format",
    "save_quantized",
    "ternary",
    "unpack",
]
