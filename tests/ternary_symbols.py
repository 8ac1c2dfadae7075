"""Symbols of ternary experts, drawn and coded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.ternary import TernaryTensor, encode_ternary


def draw(zeros: float, *shape: int, seed: int = 0) -> Tensor:
    """Independent symbols."""
    shares = [zeros, (1 - zeros) / 2, (1 - zeros) / 2]
    return torch.from_numpy(np.random.default_rng(seed).choice(3, p=shares, size=shape).astype(np.uint8))


def coded(symbols: Tensor, **how: Any) -> TernaryTensor:
    rows = symbols.shape[:-1]
    return encode_ternary(symbols, -torch.ones(rows), torch.ones(rows), **how)


def entropy(zeros: float) -> float:
    return -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)
