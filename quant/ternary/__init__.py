"""Stacked experts as ternary weights of less than one bit each (QMoE, arXiv 2310.16795)."""

from __future__ import annotations

from quant.ternary.calibration import ExpertInputs, collect_expert_inputs
from quant.ternary.experts import ExpertsReport, QuantizedExperts, TernaryConfig, quantize_experts
from quant.ternary.on_demand import DecodedExperts, PackedExperts, replace_parameter_
from quant.ternary.tensor import TernaryTensor, encode_ternary

__all__ = [
    "DecodedExperts",
    "ExpertInputs",
    "ExpertsReport",
    "PackedExperts",
    "QuantizedExperts",
    "TernaryConfig",
    "TernaryTensor",
    "collect_expert_inputs",
    "encode_ternary",
    "quantize_experts",
    "replace_parameter_",
]
