"""LoftQ: quantize a weight and find the low-rank adapters that best make up for the error."""

# ruff: noqa: N806, N815 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.blockwise import check_weight, quantize
from quant.compensated import SWEEPS, CompensatedRounding
from quant.config import check_iterations, check_rank
from quant.covariance import InputNorm
from quant.errors import QuantError
from quant.low_rank import low_rank
from quant.quantized import QuantizedTensor
from quant.scales import Storage

LARGEST_EXPONENT = 30
"""Weights with a binary exponent beyond are scaled by a power of two on the way."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoftQResult:
    """A weight as ``quantized + lora_B @ lora_A``.

    Attributes:
        quantized: The frozen part.
        lora_A: float32 (rank, in_features).
        lora_B: float32 (out_features, rank).
        errors: Relative error ``||W - Q - B A|| / ||W||`` of plain quantization (index 0) and after each
            iteration, in the norm that was minimized: Frobenius, or where a covariance was given that of the
            outputs on it, damped (`InputNorm`). The factors returned have the least of them.
    """

    quantized: QuantizedTensor
    lora_A: Tensor
    lora_B: Tensor
    errors: list[float]

    @property
    def error(self) -> float:
        """Of what is returned: the least of `errors`."""
        return min(self.errors)


def loftq(
    weight: Tensor,
    format: str | int = "nf4",
    rank: int = 16,
    iterations: int = 5,
    block_size: int = 64,
    *,
    covariance: Tensor | InputNorm | None = None,
    compensated: bool | None = None,
    fitted: bool | None = None,
    scale_storage: Storage = "float32",
    seed: int = 0,
    name: str = "the weight",
) -> LoftQResult:
    """Quantize a weight by LoftQ: alternate quantizing ``W - B A`` and fitting ``B A`` to ``W - Q``.

    The error need not fall with every iteration, so the best iterate is returned, never one worse than plain
    quantization. The work is done in float32 on the weight's device.

    Given the covariance of the layer's inputs, both steps minimize the error of its outputs instead: ``B A`` by
    the closed form ``SVD(E L) L^-1``, and Q, unless told otherwise, by error-compensating rounding.

    Args:
        weight: Floating point (out_features, in_features), finite.
        format: A name of `quant.format_names()`, or a number of bits for the best format of that many.
        rank: Rank of the adapters, at least 1.
        iterations: Alternating steps. 0 gives QLoRA's start: plain quantization, B zero and A Gaussian.
        block_size: Consecutive elements that share a scale: a power of two from 16 to 4096.
        covariance: (in_features, in_features), the mean of ``x^T x`` over calibration inputs x; None for LoftQ
            as published.
        compensated: Whether rounding makes up for its own errors (GPTQ); None for yes where a covariance is
            given. True needs one.
        fitted: As in `quantize`.
        scale_storage: As in `quantize`.
        seed: Of the Gaussian A and of the randomized low-rank step; the global generator is left alone.
        name: Of the weight, for messages.

    Returns:
        The quantized weight, the adapters, and the error after each step.

    Raises:
        QuantError: The weight is no matrix or cannot be quantized, or an argument is out of range.

    Source: Li et al., LoftQ (arXiv 2310.08659), algorithm 1; Zhang et al., QERA (arXiv 2410.06040), theorem 1,
        for the closed form.
    """
    _check(weight, rank, iterations)
    check_weight(weight, name)
    exponent = _extreme_exponent(weight)
    if exponent:
        # Squares of such weights leave float32's range: those of a power of two less or more do not.
        scaled = torch.ldexp(weight.detach().to(torch.float64), torch.tensor(-exponent))
        found = loftq(
            scaled, format, rank, iterations, block_size, covariance=covariance, compensated=compensated,
            fitted=fitted, scale_storage=scale_storage, seed=seed, name=name,
        )  # fmt: skip
        return _rescaled(found, exponent, iterations)
    target = weight.detach().to(torch.float32)
    step = _Step(
        target=target,
        format=format,
        rank=rank,
        block_size=block_size,
        norm=_input_norm(covariance, target, compensated, name),
        compensated=covariance is not None if compensated is None else compensated,
        fitted=fitted,
        scale_storage=scale_storage,
        generator=torch.Generator().manual_seed(seed),
        name=name,
    )
    quantized = step.quantize(target)
    dequantized = quantized.dequantize()
    lora_B, lora_A = _qlora_factors(target, rank, step.generator)
    errors = [step.error(target - dequantized)]
    best = quantized, lora_A, lora_B
    subspace = None
    for iteration in range(iterations):
        if iteration:
            quantized = step.quantize(target.addmm(lora_B, lora_A, alpha=-1))
            dequantized = quantized.dequantize()
        missing = dequantized.neg_().add_(target)
        del dequantized
        lora_B, lora_A, subspace = step.fit(missing, subspace)
        error = step.error(missing.addmm_(lora_B, lora_A, alpha=-1))
        del missing
        if error < min(errors):
            best = quantized, lora_A, lora_B
        errors.append(error)
    # Row-major, as they are when read back from a file: products of other strides may round otherwise.
    return LoftQResult(
        quantized=best[0], lora_A=best[1].contiguous(), lora_B=best[2].contiguous(), errors=errors
    )


@dataclass(slots=True, kw_only=True, eq=False)
class _Step:
    """The two steps that alternate, and the norm in which both are measured."""

    target: Tensor
    format: str | int
    rank: int
    block_size: int
    norm: InputNorm | None
    compensated: bool
    fitted: bool | None
    scale_storage: Storage
    generator: torch.Generator
    name: str
    rounding: CompensatedRounding | None = None

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Round a weight; with compensation go on from the codes of the time before, so that no time is worse."""
        if self.norm is not None and self.compensated:
            if self.rounding is None:
                check_weight(weight, self.name)
                self.rounding = CompensatedRounding(
                    weight, self.norm, self.format, self.block_size, self.fitted
                )
            self.rounding.retarget(weight)
            for _ in range(SWEEPS):
                self.rounding.sweep()
            return self.rounding.packed(self.scale_storage)
        return quantize(
            weight,
            self.format,
            self.block_size,
            fitted=self.fitted,
            scale_storage=self.scale_storage,
            name=self.name,
        )

    def fit(self, missing: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the B and A whose product is nearest to what is missing, and where to start the next time."""
        if self.norm is None:
            found = low_rank(missing, self.rank, self.generator, start)
            return found.left, found.right, found.subspace
        found = low_rank(self.norm.whiten(missing), self.rank, self.generator, start)
        return *_evened(found.left, self.norm.unwhiten(found.right)), found.subspace

    def error(self, missing: Tensor) -> float:
        if self.norm is None:
            return _ratio(
                float(torch.linalg.vector_norm(missing)), float(torch.linalg.vector_norm(self.target))
            )
        return _ratio(self.norm.error(missing), self.norm.error(self.target))


def _extreme_exponent(weight: Tensor) -> int:
    """Return the exponent of the largest weight where it is extreme, else 0."""
    largest = float(torch.linalg.vector_norm(weight.detach().to(torch.float64), torch.inf))
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > LARGEST_EXPONENT else 0


def _rescaled(found: LoftQResult, exponent: int, iterations: int) -> LoftQResult:
    """Return what was found for a weight as that for the weight times a power of two."""
    lower = exponent // 2
    return LoftQResult(
        quantized=found.quantized.scaled(exponent),
        lora_A=torch.ldexp(found.lora_A, torch.tensor(lower)) if iterations else found.lora_A,
        lora_B=torch.ldexp(found.lora_B, torch.tensor(exponent - lower)),
        errors=found.errors,
    )


def _evened(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product in which the two vectors of each component are equally long."""
    left_norm, right_norm = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    usable = (left_norm > 0) & (right_norm > 0)
    root = torch.where(usable, (right_norm / left_norm).sqrt(), torch.ones_like(left_norm))
    return left * root, right / root[:, None]


def _qlora_factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return B of zeros and a Gaussian A: the product is zero, yet the gradient of B is not."""
    lora_A = torch.empty(rank, weight.shape[1])
    torch.nn.init.kaiming_normal_(lora_A, a=math.sqrt(5), generator=generator)
    return weight.new_zeros(weight.shape[0], rank), lora_A.to(weight.device)


def relative_error(target: Tensor, approximation: Tensor) -> float:
    """Return ``||target - approximation|| / ||target||`` (Frobenius); 0 where the target is zero."""
    missing = torch.linalg.vector_norm(target - approximation)
    return _ratio(float(missing), float(torch.linalg.vector_norm(target)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _input_norm(
    covariance: Tensor | InputNorm | None, target: Tensor, compensated: bool | None, name: str
) -> InputNorm | None:
    if covariance is None:
        if compensated:
            raise QuantError(f"{name}: compensated rounding without a covariance", "pass covariance=")
        return None
    norm = covariance if isinstance(covariance, InputNorm) else InputNorm.of(covariance)
    if len(norm.factor) != target.shape[1]:
        raise QuantError(
            f"{name} has {target.shape[1]} inputs, the covariance {len(norm.factor)}",
            "pass the covariance of this layer's inputs",
        )
    return norm


def _check(weight: Tensor, rank: int, iterations: int) -> None:
    if weight.dim() != 2:
        raise QuantError(
            f"a weight of shape {tuple(weight.shape)} is no matrix", "pass (out_features, in_features)"
        )
    check_rank(rank)
    check_iterations(iterations)
