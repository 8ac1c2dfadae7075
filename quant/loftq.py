"""LoftQ: quantize a weight and find the low-rank adapters that best make up for the error."""

# ruff: noqa: N806, N815 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.blockwise import QuantizedTensor, quantize
from quant.errors import QuantError
from quant.low_rank import low_rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoftQResult:
    """A weight as ``quantized + lora_B @ lora_A``.

    Attributes:
        quantized: The frozen part.
        lora_A: float32 (rank, in_features).
        lora_B: float32 (out_features, rank).
        errors: Relative Frobenius error ``||W - Q - B A|| / ||W||`` of plain quantization (index 0) and after
            each iteration; the factors returned have the least of them.
    """

    quantized: QuantizedTensor
    lora_A: Tensor
    lora_B: Tensor
    errors: list[float]


def loftq(
    weight: Tensor,
    format: str = "nf4",
    rank: int = 16,
    iterations: int = 5,
    block_size: int = 64,
    seed: int = 0,
) -> LoftQResult:
    """Quantize a weight by LoftQ: alternate quantizing ``W - B A`` and fitting ``B A`` to ``W - Q``.

    The error need not fall with every iteration, so the best iterate is returned, never one worse than plain
    quantization. The work is done in float32 on the weight's device.

    Args:
        weight: Floating point (out_features, in_features), finite.
        format: A name of `quant.format_names()`.
        rank: Rank of the adapters, at least 1.
        iterations: Alternating steps. 0 gives QLoRA's start: plain quantization, B zero and A Gaussian.
        block_size: Consecutive elements that share a scale: a power of two from 16 to 4096.
        seed: Of the Gaussian A and of the randomized low-rank step; the global generator is left alone.

    Returns:
        The quantized weight, the adapters, and the error after each step.

    Raises:
        QuantError: The weight is no matrix or cannot be quantized, or an argument is out of range.

    Source: Li et al., LoftQ (arXiv 2310.08659), algorithm 1.
    """
    _check(weight, rank, iterations)
    target = weight.detach().to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    quantized = quantize(target, format, block_size)
    dequantized = quantized.dequantize()
    lora_B, lora_A = _qlora_factors(target, rank, generator)
    errors = [relative_error(target, dequantized)]
    best = quantized, lora_A, lora_B
    subspace = None
    for step in range(iterations):
        if step:
            quantized = quantize(target - lora_B @ lora_A, format, block_size)
            dequantized = quantized.dequantize()
        factors = low_rank(target - dequantized, rank, generator, subspace)
        lora_A, lora_B, subspace = factors.right, factors.left, factors.subspace
        error = relative_error(target, dequantized + lora_B @ lora_A)
        if error < min(errors):
            best = quantized, lora_A, lora_B
        errors.append(error)
    return LoftQResult(quantized=best[0], lora_A=best[1], lora_B=best[2], errors=errors)


def _qlora_factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return B of zeros and a Gaussian A: the product is zero, yet the gradient of B is not."""
    lora_A = torch.empty(rank, weight.shape[1])
    torch.nn.init.kaiming_normal_(lora_A, a=math.sqrt(5), generator=generator)
    return weight.new_zeros(weight.shape[0], rank), lora_A.to(weight.device)


def relative_error(target: Tensor, approximation: Tensor) -> float:
    """Return ``||target - approximation|| / ||target||`` (Frobenius); 0 where the target is zero."""
    norm = float(torch.linalg.vector_norm(target))
    return float(torch.linalg.vector_norm(target - approximation)) / norm if norm > 0 else 0.0


def _check(weight: Tensor, rank: int, iterations: int) -> None:
    if weight.dim() != 2:
        raise QuantError(
            f"a weight of shape {tuple(weight.shape)} is no matrix", "pass (out_features, in_features)"
        )
    if rank < 1:
        raise QuantError(
            f"adapters of rank {rank} are not possible", "choose a rank of at least 1, such as 16"
        )
    if iterations < 0:
        raise QuantError(f"{iterations} iterations are not possible", "choose 0 (QLoRA) or more, such as 5")
