"""Rounding and adapters against a covariance: never worse than without, and the closed form of the papers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import InputNorm, QuantError, format_names, get_format, loftq, quantize
from quant.compensated import CompensatedRounding, quantize_compensated
from quant.covariance import propagated_target

quick = settings(max_examples=25)
SEEDS = st.integers(0, 2**31 - 1)


def inputs(seed: int, columns: int, rows: int = 400) -> Tensor:
    """Correlated inputs whose variances span two decades."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    spread = torch.logspace(0, -1, columns)
    return torch.randn(rows, columns, generator=generator) * spread @ mixing


def random_weight(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@quick
@given(seed=SEEDS, columns=st.sampled_from([1, 5, 32, 48]))
def test_the_norm_is_the_mean_square_of_the_outputs(seed: int, columns: int) -> None:
    x, error = inputs(seed, columns), random_weight(seed, 7, columns)
    norm = InputNorm.of(second_moment(x), damping=0.0)
    variance = second_moment(x).diagonal().mean()
    outputs = (x.double() @ error.double().T).square().sum() / len(x) / variance
    assert norm.error(error) == pytest.approx(float(outputs.sqrt()), rel=1e-3)
    torch.testing.assert_close(norm.unwhiten(norm.whiten(error)), error, rtol=0, atol=1e-3)


def test_a_singular_covariance_is_damped_until_it_has_a_factor() -> None:
    x = torch.ones(10, 8)
    norm = InputNorm.of(second_moment(x))
    assert norm.factor.isfinite().all()
    torch.testing.assert_close(norm.factor @ norm.factor.T, norm.covariance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("covariance", "match"),
    [
        (torch.ones(3, 4), "shape"),
        (torch.zeros(4, 4), "zeros"),
        (torch.full((4, 4), torch.nan), "nan"),
    ],
)
def test_what_is_no_covariance_is_refused(covariance: Tensor, match: str) -> None:
    with pytest.raises(QuantError, match=match):
        InputNorm.of(covariance)


def gptq_in_numpy(weight: np.ndarray, covariance: np.ndarray, levels: np.ndarray, block: int) -> np.ndarray:
    """GPTQ by its definition: after each column, solve for the best change of those that are left."""
    left, found = weight.copy(), np.zeros_like(weight)
    columns = weight.shape[1]
    for column in range(columns):
        if column % block == 0:
            scale = np.abs(left[:, column : column + block]).max(axis=1)
        value = levels[np.abs(left[:, column, None] / scale[:, None] - levels).argmin(axis=1)] * scale
        found[:, column] = value
        rest = slice(column + 1, columns)
        # min over d of (e, d) H (e, d)^T with e fixed: d = -e H_cr H_rr^-1
        error = left[:, column] - value
        if column + 1 < columns:
            step = np.linalg.solve(covariance[rest, rest], covariance[rest, column])
            left[:, rest] += error[:, None] * step
    return found


@quick
@given(seed=SEEDS, format=st.sampled_from(["nf4", "int4", "nf2", "int8"]))
def test_without_sweeps_it_is_gptq(seed: int, format: str) -> None:
    weight, norm = random_weight(seed, 6, 32), InputNorm.of(second_moment(inputs(seed, 32)))
    found = quantize_compensated(weight, norm, format, 16, fitted=False, sweeps=0).dequantize()
    levels = get_format(format).levels.double().numpy()
    expected = gptq_in_numpy(weight.double().numpy(), norm.covariance.double().numpy(), levels, 16)
    # Float32 may round a weight half way between two levels to the other one, and go on from there.
    same = np.isclose(found.numpy(), expected, rtol=1e-4, atol=1e-5).all(axis=1)
    assert same.sum() >= 5


@quick
@given(
    seed=SEEDS,
    format=st.sampled_from(format_names()),
    fitted=st.booleans(),
    columns=st.sampled_from([48, 40, 7, 1]),
)
def test_no_sweep_is_worse_than_the_one_before(seed: int, format: str, fitted: bool, columns: int) -> None:
    weight, norm = random_weight(seed, 9, columns), InputNorm.of(second_moment(inputs(seed, columns)))
    rounding = CompensatedRounding(weight, norm, format, 16, fitted)
    errors = [norm.error(weight - rounding.dequantized())]
    for _ in range(4):
        rounding.sweep()
        errors.append(norm.error(weight - rounding.dequantized()))
    assert all(after <= before + 1e-5 * norm.error(weight) for before, after in pairwise(errors))
    packed = rounding.packed()
    torch.testing.assert_close(packed.dequantize(), rounding.dequantized(), rtol=0, atol=1e-5)
    assert packed.shape == (9, columns)


@quick
@given(seed=SEEDS, format=st.sampled_from(format_names()))
def test_after_sweeps_no_code_alone_can_be_bettered(seed: int, format: str) -> None:
    weight, norm = random_weight(seed, 3, 16), InputNorm.of(second_moment(inputs(seed, 16)))
    rounding = CompensatedRounding(weight, norm, format, 16, fitted=False)
    for _ in range(30):
        rounding.sweep()
    packed = rounding.packed()
    covariance, values = norm.covariance.double(), packed.dequantize(torch.float64)
    levels = get_format(format).levels.double() * packed.absmax.double()[:, None]
    if packed.offsets is not None:
        levels = levels + packed.offsets.values().double()[:, None]

    def loss(row: int, candidate: Tensor) -> float:
        error = weight[row].double() - candidate
        return float(error @ covariance @ error)

    for row in range(3):
        best = loss(row, values[row])
        for column in range(16):
            for level in levels[row]:
                changed = values[row].clone()
                changed[column] = level
                assert loss(row, changed) >= best - 1e-6 * (1 + best)


@quick
@given(seed=SEEDS, format=st.sampled_from(["nf2", "uint2", "nf4", "lloyd3"]))
def test_outputs_are_nearer_than_by_plain_rounding(seed: int, format: str) -> None:
    x, weight = inputs(seed, 64), random_weight(seed, 24, 64)
    norm = InputNorm.of(second_moment(x))
    plain = quantize(weight, format, 32).dequantize()
    compensated = quantize_compensated(weight, norm, format, 32).dequantize()
    assert norm.error(weight - compensated) < norm.error(weight - plain)


def test_with_independent_inputs_it_is_plain_rounding() -> None:
    weight, norm = random_weight(0, 20, 72), InputNorm.of(torch.eye(72))
    for format, block in (("nf4", 64), ("uint2", 8 * 2), ("int3", 32)):
        plain = quantize(weight, format, block)
        found = quantize_compensated(weight, norm, format, block, sweeps=0)
        assert torch.equal(found.codes, plain.codes)
        torch.testing.assert_close(found.absmax, plain.absmax)


@quick
@given(seed=SEEDS, rank=st.integers(1, 6))
def test_adapters_are_the_closed_form(seed: int, rank: int) -> None:
    """QERA's theorem: B A = SVD_r(E R^(1/2)) R^(-1/2), here in float64 with the symmetric root."""
    weight, x = random_weight(seed, 20, 24), inputs(seed, 24)
    norm = InputNorm.of(second_moment(x))
    found = loftq(weight, "nf2", rank, 1, 16, covariance=norm, compensated=False)
    error = (weight - found.quantized.dequantize()).double().numpy()
    values, vectors = np.linalg.eigh(norm.covariance.double().numpy())
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    u, s, vt = np.linalg.svd(error @ root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ inverse
    product = (found.lora_B @ found.lora_A).double().numpy()
    best, reached = (np.linalg.norm((error - p) @ root) for p in (expected, product))
    assert reached <= best * 1.001
    if rank < len(s) and s[rank - 1] > 1.05 * s[rank]:
        np.testing.assert_allclose(product, expected, atol=2e-2 * np.abs(expected).max())


@quick
@given(seed=SEEDS, format=st.sampled_from(["nf4", "nf2", "uint2", "uint3"]))
def test_loftq_in_this_norm_never_gets_worse(seed: int, format: str) -> None:
    weight, x = random_weight(seed, 32, 48), inputs(seed, 48)
    found = loftq(weight, format, 4, 4, 16, covariance=second_moment(x))
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(found.errors))
    norm = InputNorm.of(second_moment(x))
    reached = norm.error(weight - found.quantized.dequantize() - found.lora_B @ found.lora_A)
    assert reached / norm.error(weight) == pytest.approx(min(found.errors), rel=1e-3)
    published = loftq(weight, format, 4, 4, 16)
    assert reached < norm.error(
        weight - published.quantized.dequantize() - published.lora_B @ published.lora_A
    )


def test_a_covariance_of_another_layer_is_refused_by_name() -> None:
    with pytest.raises(QuantError, match=r"up has 48 inputs, the covariance 32"):
        loftq(random_weight(0, 8, 48), covariance=torch.eye(32), name="up")
    with pytest.raises(QuantError, match="without a covariance"):
        loftq(random_weight(0, 8, 48), compensated=True)


@quick
@given(seed=SEEDS)
def test_the_propagated_target_is_the_least_squares_answer(seed: int) -> None:
    x = inputs(seed, 12).double()
    shifted = x + 0.3 * inputs(seed + 1, 12).double()
    weight = random_weight(seed, 5, 12)
    found = propagated_target(weight, second_moment(shifted), x.T @ shifted / len(x))
    damping = 0.01 * second_moment(shifted).diagonal().mean()
    # Ridge regression towards W itself: stack sqrt(damping) I under the inputs.
    rows = torch.cat([shifted, (damping * len(x)).sqrt() * torch.eye(12, dtype=torch.float64)])
    wanted = torch.cat([x @ weight.double().T, (damping * len(x)).sqrt() * weight.double().T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    half = propagated_target(weight, second_moment(shifted), x.T @ shifted / len(x), 0.5)
    torch.testing.assert_close(half, (weight + found) / 2, rtol=1e-4, atol=1e-5)
