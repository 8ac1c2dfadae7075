"""Stacked experts to ternary weights, or to two bits where ternary ones would not pay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.blockwise import check_weight, quantize
from quant.errors import QuantError
from quant.quantized import QuantizedTensor, check_block_size, stored_nbytes
from quant.scales import Storage, check_storage
from quant.ternary.compensation import compensated_symbols, squared_output_error
from quant.ternary.grid import Levels, as_stored, check_grid, row_grid
from quant.ternary.tensor import TernaryTensor, encode_ternary

EXPERTS_AT_ONCE = 16
PLAIN_FORMAT = "uint2"


@dataclass(frozen=True, slots=True, kw_only=True)
class TernaryConfig:
    """How experts are quantized. The paper's own choice is `levels="extremes"`.

    Attributes:
        levels: "fitted" or "extremes" (each row's least and largest weight), see `row_grid`.
        zeros: Share of each row's weights to make zero before compensation, which takes a few hundredths back;
            None cuts half way to the row's least and largest weight. Fewer zeros: a better fit, a higher rate.
        damping: Share of the covariance's mean diagonal added to its diagonal.
        fewest_tokens: Experts that saw fewer are rounded to the nearest level.
        most_bits: Two bits are taken if ternary weights need more bits a weight than this, all included.
        most_error: Two bits are taken if the relative error is larger: of the output where there is a covariance,
            else of the weight.
        block_size: Of the two-bit format "uint2".
        scale_storage: Of the two-bit format.
    """

    levels: Levels = "fitted"
    zeros: float | None = None
    damping: float = 0.1
    fewest_tokens: int = 8
    most_bits: float | None = None
    most_error: float | None = None
    block_size: int = 64
    scale_storage: Storage = "double"

    def __post_init__(self) -> None:
        check_grid(self.levels, self.zeros)
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise QuantError(f"a damping of {self.damping}", "use a small positive number, such as 0.1")
        if not isinstance(self.fewest_tokens, int) or self.fewest_tokens < 0:
            raise QuantError(f"fewest_tokens of {self.fewest_tokens!r}", "use a whole number, such as 8")
        for name in ("most_bits", "most_error"):
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise QuantError(f"{name} of {limit}", "use a positive number, or None for no limit")
        check_block_size(self.block_size)
        check_storage(self.scale_storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsReport:
    """What became of one stack of experts, and why.

    Attributes:
        name: Of the weight.
        format: "ternary" or "uint2".
        reason: Why that one.
        zeros: Share of zeros among the ternary symbols.
        entropy: Of the ternary symbols, bits a weight.
        code_bits: Bits a weight of the ternary codes alone.
        ternary_bits: Bits a weight of the ternary form, all included.
        two_bit_bits: Bits a weight of the two-bit form, all included.
        compensated: Experts whose error was compensated; the others are rounded to the nearest.
        weight_error: Relative error of the ternary weights, Frobenius.
        output_error: Relative error of their outputs over the covariance; None without one.
    """

    name: str
    format: str
    reason: str
    zeros: float
    entropy: float
    code_bits: float
    ternary_bits: float
    two_bit_bits: float
    compensated: int
    weight_error: float
    output_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedExperts:
    """A stack of experts in the form that was chosen for it, and the report of the choice."""

    quantized: TernaryTensor | QuantizedTensor
    report: ExpertsReport


def quantize_experts(
    weight: Tensor,
    covariance: Tensor | None = None,
    tokens: Tensor | None = None,
    config: TernaryConfig | None = None,
    name: str = "the weight",
) -> QuantizedExperts:
    """Quantize a stack of experts to dictionary-coded ternary weights, or to two bits where those do not pay.

    Args:
        weight: Floating point (experts, rows, columns), or (rows, columns) for one; finite. Inputs meet columns:
            a stack that is stored as (experts, in, out) is passed as `weight.mT`.
        covariance: Floating point (experts, columns, columns), or (columns, columns) for one: X^T X of the inputs
            that the router sends to each expert, of any scale; without it weights are rounded to the nearest level.
        tokens: Integers (experts,): how many inputs each covariance is made of; None for enough.
        config: None for the defaults.
        name: Of the weight, for messages and the report.

    Returns:
        The quantized stack and what was measured.

    Raises:
        QuantError: The weight cannot be quantized, or the covariance does not fit it.

    Source: Frantar and Alistarh, QMoE (arXiv 2310.16795).
    """
    config = config or TernaryConfig()
    if covariance is not None and covariance.dim() == weight.dim() == 2:
        covariance = covariance[None]
    stack = weight.detach().view(-1, *weight.shape[-2:]) if weight.dim() in (2, 3) else weight
    _check(stack, covariance, tokens, name)
    rounded = _round(stack, covariance, tokens, config)
    symbols = rounded.symbols.view(weight.shape)
    coded = encode_ternary(symbols, rounded.low, rounded.high)
    report = _report(name, coded, rounded, config)
    if report.format == "ternary":
        return QuantizedExperts(quantized=coded, report=report)
    plain = quantize(weight, PLAIN_FORMAT, config.block_size, scale_storage=config.scale_storage, name=name)
    return QuantizedExperts(quantized=plain, report=report)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rounded:
    """Experts as symbols and levels.

    Attributes:
        symbols: uint8 (experts, rows, columns).
        low: float32 (experts, rows).
        high: float32 (experts, rows).
        compensated: bool (experts,).
        squares: float64 (4,): squared weights and their errors, squared outputs and their errors.
    """

    symbols: Tensor
    low: Tensor
    high: Tensor
    compensated: Tensor
    squares: Tensor


def _round(
    stack: Tensor, covariance: Tensor | None, tokens: Tensor | None, config: TernaryConfig
) -> _Rounded:
    """Round all experts, some of them at a time."""
    # Powers of two change no digit, and keep squares of any weights within float32's range.
    largest = torch.stack(stack.aminmax()).abs().amax().to(torch.float32)
    unit = 2.0 ** min(max(int(largest.frexp().exponent), -126), 126)
    parts = []
    for start in range(0, len(stack), EXPERTS_AT_ONCE):
        some = slice(start, start + EXPERTS_AT_ONCE)
        weight = stack[some].to(torch.float32) / unit
        inputs = None if covariance is None else covariance[some].to(torch.float32)
        enough = None if tokens is None else tokens[some] >= config.fewest_tokens
        parts.append(_round_some(weight, inputs, enough, config))
    return _Rounded(
        symbols=torch.cat([part.symbols for part in parts]),
        low=as_stored(torch.cat([part.low for part in parts]) * unit),
        high=as_stored(torch.cat([part.high for part in parts]) * unit),
        compensated=torch.cat([part.compensated for part in parts]),
        squares=torch.stack([part.squares for part in parts]).sum(dim=0),
    )


def _round_some(
    weight: Tensor, covariance: Tensor | None, enough: Tensor | None, config: TernaryConfig
) -> _Rounded:
    """Round each expert with compensation where that is possible and better on its inputs, else to the nearest."""
    grid = row_grid(weight, config.levels, config.zeros)
    symbols = grid.symbols(weight)
    better = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    outputs = outputs_error = weight.new_zeros(len(weight), dtype=torch.float64)
    if covariance is not None:
        compensated = compensated_symbols(weight, covariance, grid, config.damping)
        nearest_error, outputs_error = (
            squared_output_error(weight - grid.values(some), covariance) for some in (symbols, compensated)
        )
        better = outputs_error < nearest_error
        if enough is not None:
            better &= enough.to(better.device)
        symbols = torch.where(better[:, None, None], compensated, symbols)
        outputs_error = torch.where(better, outputs_error, nearest_error)
        outputs = squared_output_error(weight, covariance)
    error = weight - grid.values(symbols)
    sums = weight.square().sum(dtype=torch.float64), error.square().sum(dtype=torch.float64)
    return _Rounded(
        symbols=symbols,
        low=grid.low,
        high=grid.high,
        compensated=better,
        squares=torch.stack([*sums, outputs.sum(), outputs_error.sum()]),
    )


def _report(name: str, coded: TernaryTensor, rounded: _Rounded, config: TernaryConfig) -> ExpertsReport:
    """Measure the ternary form, and choose."""
    shares = [int((rounded.symbols == symbol).sum()) / rounded.symbols.numel() for symbol in range(3)]
    weights, weights_error, outputs, outputs_error = rounded.squares.tolist()
    count = math.prod(coded.shape)
    two_bit_bits = 8 * stored_nbytes(count, PLAIN_FORMAT, config.block_size, config.scale_storage) / count
    weight_error = math.sqrt(weights_error / weights) if weights else 0.0
    output_error = math.sqrt(outputs_error / outputs) if outputs else None
    error = weight_error if output_error is None else output_error
    bits = f"{coded.bits_per_weight:.3f} bits a weight"
    format, reason = PLAIN_FORMAT, ""
    if coded.bits_per_weight >= two_bit_bits:
        reason = f"ternary codes would need {bits}, two bits need {two_bit_bits:.3f}"
    elif config.most_bits is not None and coded.bits_per_weight > config.most_bits:
        reason = f"ternary codes would need {bits}, more than the {config.most_bits:g} allowed"
    elif config.most_error is not None and error > config.most_error:
        reason = f"the ternary error would be {error:.3f}, more than the {config.most_error:g} allowed"
    else:
        format, reason = "ternary", f"{bits}, two bits would need {two_bit_bits:.3f}"
    return ExpertsReport(
        name=name,
        format=format,
        reason=reason,
        zeros=shares[0],
        entropy=sum(-share * math.log2(share) for share in shares if share),
        code_bits=coded.code_bits,
        ternary_bits=coded.bits_per_weight,
        two_bit_bits=two_bit_bits,
        compensated=int(rounded.compensated.sum()),
        weight_error=weight_error,
        output_error=output_error,
    )


def _check(stack: Tensor, covariance: Tensor | None, tokens: Tensor | None, name: str) -> None:
    if stack.dim() != 3:
        raise QuantError(
            f"{name} of shape {tuple(stack.shape)} is no stack of experts",
            "pass (experts, rows, columns) or (rows, columns)",
        )
    check_weight(stack, name)
    experts, _, columns = stack.shape
    if covariance is not None and covariance.shape != (experts, columns, columns):
        raise QuantError(
            f"a covariance {tuple(covariance.shape)} does not fit {name} {tuple(stack.shape)}",
            f"pass ({experts}, {columns}, {columns})",
        )
    if covariance is not None and not bool(covariance.isfinite().all()):
        raise QuantError(f"the covariance of {name} holds nan or infinity", "leave out the inputs that do")
    if tokens is not None and tokens.shape != (experts,):
        raise QuantError(f"token counts {tuple(tokens.shape)} for {experts} experts", f"pass ({experts},)")
