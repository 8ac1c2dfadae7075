"""Ternary experts: rounded with compensation, in two bits where the coding would not pay."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant import QuantError, QuantizedTensor
from quant.ternary import TernaryConfig, TernaryTensor, encode_ternary, quantize_experts
from quant.ternary.compensation import compensated_symbols
from quant.ternary.grid import row_grid


def spread_inputs(experts: int, columns: int, tokens: int, seed: int) -> Tensor:
    """Correlated inputs whose spectrum decays: float32 (experts, tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(experts, columns, columns, generator=generator)).Q
    return (torch.randn(experts, tokens, columns, generator=generator) / torch.arange(1, columns + 1)) @ basis


def test_the_extremes_are_those_of_the_paper() -> None:
    weight = torch.tensor([[1.0, 0.5, 0.51, -2.0, -1.0, -1.01, 0.0], [3.0, 1.0, 2.0, 3.0, 3.0, 3.0, 1.5]])
    grid = row_grid(weight, "extremes")
    assert grid.symbols(weight).tolist() == [[2, 0, 2, 1, 0, 1, 0], [2, 0, 2, 2, 2, 2, 0]]
    assert grid.values(grid.symbols(weight)).tolist() == [
        [1.0, 0, 1.0, -2.0, 0, -2.0, 0],
        [3.0, 0, 3.0, 3.0, 3.0, 3.0, 0],
    ]


@given(seed=st.integers(0, 2**32 - 1), zeros=st.sampled_from([None, 0.5, 0.9]))
def test_fitted_levels_are_the_least_squares_ones(seed: int, zeros: float | None) -> None:
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 40)).astype(np.float32))
    grid = row_grid(weight, "fitted", zeros)
    symbols = grid.symbols(weight).numpy()
    for row, (low, high) in enumerate(zip(grid.low.tolist(), grid.high.tolist(), strict=True)):
        for symbol, level in ((1, low), (2, high)):
            chosen = weight.numpy()[row][symbols[row] == symbol]
            assert level == pytest.approx(chosen.mean() if len(chosen) else 0, rel=2**-8, abs=1e-6)
    if zeros is not None:
        assert (symbols == 0).mean(axis=1) == pytest.approx(zeros)


def test_compensated_rounding_follows_the_definition() -> None:
    """GPTQ by its definition, in float64: after each column, the best change of the columns not yet rounded."""
    inputs = spread_inputs(2, 20, 50, seed=3)
    weight = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(4))
    covariance = inputs.mT @ inputs
    grid = row_grid(weight)
    found = compensated_symbols(weight, covariance, grid, damping=0.1)
    for expert in range(2):
        hessian = covariance[expert].double().numpy()
        hessian = hessian + 0.1 * np.diag(hessian).mean() * np.eye(20)
        for row in range(5):
            rest = weight[expert, row].double().numpy().copy()
            low, high, low_cut, high_cut = (
                float(part[expert, row]) for part in (grid.low, grid.high, grid.low_cut, grid.high_cut)
            )
            for column in range(20):
                now = rest[column]
                symbol = 2 if now > high_cut else 1 if now < low_cut else 0
                assert int(found[expert, row, column]) == symbol
                error = (0, low, high)[symbol] - now
                later = slice(column + 1, None)
                rest[later] -= np.linalg.solve(hessian[later, later], hessian[later, column]) * error


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = spread_inputs(2, 50, 80, seed=5)
    weight = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(6))
    whole = compensated_symbols(weight, inputs.mT @ inputs, row_grid(weight))
    monkeypatch.setattr("quant.ternary.compensation.BLOCK", 16)
    blocked = compensated_symbols(weight, inputs.mT @ inputs, row_grid(weight))
    assert (whole != blocked).float().mean() < 0.005


@pytest.mark.parametrize("levels", ["fitted", "extremes"])
def test_compensation_is_never_worse_on_the_inputs(levels: Any) -> None:
    for seed in range(3):
        inputs, new = spread_inputs(3, 96, 800, seed=seed).chunk(2, dim=1)
        weight = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(seed))
        covariance = inputs.mT @ inputs
        config = TernaryConfig(levels=levels, block_size=16, scale_storage="float32")
        nearest = quantize_experts(weight, config=config).quantized.dequantize()
        result = quantize_experts(weight, covariance, config=config)
        assert isinstance(result.quantized, TernaryTensor)
        values = result.quantized.dequantize()
        for one in (inputs, new):
            errors = [
                float(((weight - some) @ one.mT).norm() / (weight @ one.mT).norm())
                for some in (nearest, values)
            ]
            assert errors[1] < 0.8 * errors[0]
            if one is inputs:
                assert result.report.output_error == pytest.approx(errors[1], rel=1e-3)
        assert result.report.compensated == 3
        assert result.report.weight_error == pytest.approx(
            float((weight - values).norm() / weight.norm()), rel=1e-4
        )


def test_without_a_cholesky_factor_weights_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0))
    covariance = torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(1))
    covariance = torch.cat([-covariance[:2].mT @ covariance[:2], torch.ones(1, 40, 40) - 2 * torch.eye(40)])
    grid = row_grid(weight)
    assert torch.equal(compensated_symbols(weight, covariance, grid), grid.symbols(weight))


def test_experts_without_inputs_are_rounded_to_the_nearest() -> None:
    inputs = spread_inputs(4, 64, 200, seed=1)
    weight = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(2))
    covariance = inputs.mT @ inputs
    covariance[1] = 0  # saw nothing
    covariance[2] = -covariance[2]  # no covariance: has no Cholesky factor
    config = TernaryConfig(fewest_tokens=10, block_size=16, scale_storage="float32")
    result = quantize_experts(weight, covariance, torch.tensor([200, 0, 200, 9]), config)
    nearest = quantize_experts(weight, config=config)
    assert result.report.compensated == 1
    same = (result.quantized.dequantize() == nearest.quantized.dequantize()).flatten(1).all(dim=1)
    assert same.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 4, 33),
        torch.full((2, 4, 33), 0.7),
        torch.full((2, 4, 33), -0.7),
        torch.full((2, 4, 1), 0.25),
        torch.randn(2, 4, 33, generator=torch.Generator().manual_seed(0)) * 1e30,
        torch.randn(2, 4, 33, generator=torch.Generator().manual_seed(0)) * 1e-40,
        torch.full((1, 2, 5), torch.finfo(torch.float32).max),
        torch.randn(2, 4, 33, generator=torch.Generator().manual_seed(0)).bfloat16(),
    ],
    ids=["zeros", "constant", "negative", "one column", "huge", "denormal", "largest", "bfloat16"],
)
def test_odd_weights(weight: Tensor) -> None:
    eye = torch.eye(weight.shape[-1]).expand(len(weight), -1, -1)
    report = quantize_experts(weight, eye).report
    assert 0 <= report.weight_error < 0.9
    assert math.isfinite(report.ternary_bits)
    grid = row_grid(weight.float())
    tensor = encode_ternary(grid.symbols(weight.float()), grid.low, grid.high)
    assert torch.equal(tensor.dequantize(), grid.values(grid.symbols(weight.float())))
    if weight.unique().numel() == 1:
        torch.testing.assert_close(tensor.dequantize(), weight.float(), rtol=2**-8, atol=0)


def test_two_bits_where_the_coding_would_not_pay() -> None:
    narrow = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
    result = quantize_experts(narrow)
    assert isinstance(result.quantized, QuantizedTensor)
    assert result.report.format == result.quantized.format == "uint2"
    assert result.report.ternary_bits > result.report.two_bit_bits
    assert result.report.two_bit_bits == pytest.approx(8 * result.quantized.nbytes / narrow.numel())
    assert "would need" in result.report.reason


@pytest.mark.parametrize(
    ("bound", "format"),
    [
        ({"most_bits": 1.2}, "ternary"),
        ({"most_bits": 0.5}, "uint2"),
        ({"most_error": 0.9}, "ternary"),
        ({"most_error": 0.3}, "uint2"),
    ],
)
def test_two_bits_where_a_bound_is_not_met(bound: dict[str, float], format: str) -> None:
    weight = torch.randn(2, 32, 512, generator=torch.Generator().manual_seed(0))
    result = quantize_experts(weight, config=TernaryConfig(**bound), name="experts.up")
    assert result.report.format == format
    assert result.report.name == "experts.up"
    assert ("allowed" in result.report.reason) == (format == "uint2")
    assert result.quantized.shape == (2, 32, 512)


def test_the_report_is_what_was_stored() -> None:
    weight = torch.randn(2, 32, 512, generator=torch.Generator().manual_seed(0))
    result = quantize_experts(weight)
    report, values = result.report, result.quantized.dequantize()
    assert isinstance(result.quantized, TernaryTensor)
    shares = [float((values * sign > 0).float().mean()) for sign in (-1, 1)]
    shares.append(1 - sum(shares))
    assert report.zeros == pytest.approx(shares[-1])
    assert report.entropy == pytest.approx(-sum(share * math.log2(share) for share in shares))
    assert report.code_bits == 8 * result.quantized.codes.nbytes / weight.numel()
    assert report.ternary_bits == result.quantized.bits_per_weight
    assert report.output_error is None
    assert report.compensated == 0


def test_one_matrix_is_one_expert() -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    inputs = spread_inputs(1, 96, 200, seed=1)[0]
    one = quantize_experts(weight, inputs.mT @ inputs)
    stacked = quantize_experts(weight[None], (inputs.mT @ inputs)[None])
    assert one.quantized.shape == (32, 96)
    assert torch.equal(one.quantized.dequantize(), stacked.quantized.dequantize()[0])
    assert one.report == stacked.report
    # Stored as (experts, in, out), the way its users read it is a transposed view.
    transposed = quantize_experts(weight.mT.contiguous().mT, inputs.mT @ inputs)
    assert torch.equal(one.quantized.dequantize(), transposed.quantized.dequantize())


def test_experts_are_quantized_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = spread_inputs(5, 64, 200, seed=1)
    covariance = inputs.mT @ inputs
    weight = torch.randn(5, 64, 64, generator=torch.Generator().manual_seed(2))
    together = quantize_experts(weight, covariance)
    monkeypatch.setattr("quant.ternary.experts.EXPERTS_AT_ONCE", 2)
    apart = quantize_experts(weight, covariance)
    same = together.quantized.dequantize() == apart.quantized.dequantize()
    assert same.float().mean() > 0.999
    assert apart.report.compensated == 5
    assert apart.report.output_error == pytest.approx(together.report.output_error, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_weights_and_inputs_does_not_matter(scale: float) -> None:
    inputs = spread_inputs(2, 64, 200, seed=1)
    covariance = inputs.mT @ inputs
    weight = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(2))
    plain, scaled = quantize_experts(weight, covariance), quantize_experts(weight * scale, covariance * scale)
    assert scaled.report.compensated == 2
    assert scaled.report.output_error == pytest.approx(plain.report.output_error, rel=1e-2)
    assert scaled.report.weight_error == pytest.approx(plain.report.weight_error, rel=1e-2)


def test_fewer_zeros_fit_better_at_a_higher_rate() -> None:
    weight = torch.randn(2, 32, 512, generator=torch.Generator().manual_seed(0))
    reports = [
        quantize_experts(weight, config=TernaryConfig(zeros=zeros)).report for zeros in (0.6, 0.8, 0.9)
    ]
    assert [report.weight_error for report in reports] == sorted(report.weight_error for report in reports)
    assert [report.code_bits for report in reports] == sorted((r.code_bits for r in reports), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((torch.zeros(3),), "no stack of experts"),
        ((torch.full((2, 3, 4), math.nan),), "nan"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 3)), "does not fit"),
        ((torch.zeros(2, 3, 4), torch.full((2, 4, 4), math.nan)), "covariance of the weight holds nan"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 4, 4), torch.zeros(3)), "token counts"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Tensor, ...], problem: str) -> None:
    with pytest.raises(QuantError, match=problem):
        quantize_experts(*arguments)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"levels": "widest"}, "widest"),
        ({"zeros": 1.0}, "share of 1.0 zeros"),
        ({"damping": 0.0}, "damping of 0.0"),
        ({"fewest_tokens": -1}, "fewest_tokens of -1"),
        ({"fewest_tokens": 0.5}, "fewest_tokens of 0.5"),
        ({"most_bits": 0.0}, "most_bits of 0.0"),
        ({"most_error": math.nan}, "most_error of nan"),
        ({"block_size": 48}, "block of 48"),
        ({"scale_storage": "float8"}, "float8"),
    ],
)
def test_a_wrong_config_is_refused(wrong: Any, match: str) -> None:
    with pytest.raises(QuantError, match=match):
        TernaryConfig(**wrong)
