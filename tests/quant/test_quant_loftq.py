"""LoftQ against the paper's algorithm in float64 with a full SVD, and what must hold of any result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import QuantError, QuantLinear, format_names, get_format, loftq, quantize
from quant.low_rank import low_rank
from quant.parameters import PackedParameter


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Draw a matrix of noise over a few strong directions, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator)
    strong = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    return 0.02 * (noise + 0.5 * strong)


def nearest(weight: np.ndarray, levels: np.ndarray, block_size: int) -> np.ndarray:
    """Quantize and dequantize in float64 by the definition."""
    blocks = weight.reshape(-1, block_size)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.abs((blocks / scales)[..., None] - levels).argmin(axis=-1)
    return (levels[codes] * scales).reshape(weight.shape)


def reference_errors(weight: torch.Tensor, format: str, rank: int, iterations: int) -> list[float]:
    """Algorithm 1 of the paper, to the letter."""
    target, levels = weight.double().numpy(), get_format(format).levels.double().numpy()
    product = np.zeros_like(target)
    errors = []
    for _ in range(iterations):
        quantized = nearest(target - product, levels, 64)
        left, values, right = np.linalg.svd(target - quantized, full_matrices=False)
        product = (left[:, :rank] * values[:rank]) @ right[:rank]
        errors.append(float(np.linalg.norm(target - quantized - product) / np.linalg.norm(target)))
    return errors


def error_of(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    return float((weight.double() - approximation.double()).norm() / weight.double().norm())


# The first two take the exact step, the others the randomized one, wide and tall.
@pytest.mark.parametrize("shape", [(128, 64), (96, 192), (288, 384), (512, 272)])
@pytest.mark.parametrize("format", ["nf4", "nf2", "int3"])
def test_each_iteration_is_the_papers(format: str, shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    result = loftq(weight, format, rank=8, iterations=5)
    assert len(result.errors) == 6
    assert result.errors[0] == pytest.approx(
        error_of(weight, quantize(weight, format).dequantize()), rel=1e-5
    )
    reference = reference_errors(weight, format, 8, 5)
    np.testing.assert_allclose(result.errors[1:3], reference[:2], rtol=1e-3)
    # Where a weight lies half way between two levels, the least difference flips its code: two runs part after
    # some iterations, and either may end a little lower.
    np.testing.assert_allclose(result.errors[1:], reference, rtol=3e-3)
    assert min(result.errors) <= (1.003 if format == "nf2" else 1.001) * min(reference)


@given(
    format=st.sampled_from(format_names()),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 6),
    iterations=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_the_result_has_the_least_error_seen_and_is_never_worse_than_plain(
    format: str, rows: int, columns: int, rank: int, iterations: int, seed: int
) -> None:
    weight = matrix(rows, columns, seed)
    result = loftq(weight, format, rank, iterations, block_size=16)
    product = result.lora_B.double() @ result.lora_A.double()
    error = error_of(weight, result.quantized.dequantize(torch.float64) + product)
    assert result.lora_A.shape == (rank, columns)
    assert result.lora_B.shape == (rows, rank)
    assert result.lora_A.dtype == result.lora_B.dtype == torch.float32
    assert error == pytest.approx(result.error, rel=1e-4, abs=1e-6)
    assert result.error == min(result.errors) <= result.errors[0]


# The first weight's error falls, then rises; the second one's falls again after a rise, but never as low.
@pytest.mark.parametrize(("format", "seed"), [("nf2", 3), ("int2", 8)])
def test_the_best_iterate_is_returned_where_the_error_rises(format: str, seed: int) -> None:
    weight = matrix(64, 64, seed)
    result = loftq(weight, format, rank=16, iterations=12)
    best = int(np.argmin(result.errors))
    assert best < 12, "this weight's error does not rise: choose another seed"
    returned = error_of(weight, result.quantized.dequantize() + result.lora_B @ result.lora_A)
    assert returned == pytest.approx(result.errors[best], rel=1e-5)
    assert returned < result.errors[-1]


@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 24), ((40, 24), 30), ((1, 64), 1), ((64, 1), 4)])
def test_a_full_rank_makes_up_for_everything(shape: tuple[int, int], rank: int) -> None:
    result = loftq(matrix(*shape), "nf2", rank, iterations=1)
    assert result.lora_A.shape == (rank, shape[1])
    assert min(result.errors) < 1e-6


def test_no_iteration_is_qloras_start() -> None:
    weight = matrix(200, 96)
    result = loftq(weight, "nf4", rank=8, iterations=0)
    assert torch.equal(result.quantized.codes, quantize(weight).codes)
    assert torch.equal(result.lora_B, torch.zeros(200, 8))
    assert len(result.errors) == 1
    # Kaiming's normal with a = sqrt(5): variance 1 / (3 fan_in).
    assert float(result.lora_A.std()) == pytest.approx((1 / (3 * 96)) ** 0.5, rel=0.1)


def test_a_weight_on_the_grid_keeps_trainable_adapters() -> None:
    weight = quantize(matrix(32, 64), "int4").dequantize()
    result = loftq(weight, "int4", rank=2)
    assert result.errors[0] < 1e-7
    assert result.lora_A.abs().sum() > 0


def test_zeros_are_kept() -> None:
    result = loftq(torch.zeros(8, 64), rank=2)
    assert set(result.errors) == {0.0}
    assert torch.equal(result.quantized.dequantize() + result.lora_B @ result.lora_A, torch.zeros(8, 64))


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    weight, state = matrix(300, 300), torch.random.get_rng_state()
    first, second, other = loftq(weight, rank=2), loftq(weight, rank=2), loftq(weight, rank=2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.lora_A, second.lora_A)
    assert torch.equal(first.quantized.codes, second.quantized.codes)
    assert not torch.equal(first.lora_A, other.lora_A)


@given(
    rows=st.integers(1, 300), columns=st.integers(1, 300), rank=st.integers(1, 20), seed=st.integers(0, 99)
)
@settings(max_examples=40)
def test_low_rank_is_nearly_the_truncated_svd(rows: int, columns: int, rank: int, seed: int) -> None:
    target = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    factors = low_rank(target, rank, torch.Generator().manual_seed(seed))
    values = np.linalg.svd(target.double().numpy(), compute_uv=False)
    least = np.sqrt((values[rank:] ** 2).sum())
    error = float((target.double() - factors.left.double() @ factors.right.double()).norm())
    assert least - 1e-5 * values[0] <= error <= 1.002 * least + 1e-5 * values[0]
    # The split is even: both factors have the same column norms, roots of the singular values.
    np.testing.assert_allclose(factors.left.norm(dim=0), factors.right.norm(dim=1), rtol=1e-3, atol=1e-3)


def test_a_warm_start_costs_fewer_steps_and_no_quality() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(512, 512, generator=generator)
    cold = low_rank(target, 16, generator)
    assert cold.subspace is not None
    warm = low_rank(target, 16, generator, cold.subspace)
    norm = [float((target - each.left @ each.right).norm()) for each in (cold, warm)]
    assert norm[1] <= norm[0]


@pytest.mark.parametrize(
    ("weight", "arguments", "match"),
    [
        (torch.ones(4), {}, "no matrix"),
        (torch.ones(4, 4), {"rank": 0}, "rank 0"),
        (torch.ones(4, 4), {"iterations": -1}, "-1 iterations"),
        (torch.ones(4, 4), {"format": "nf9"}, "nf9"),
        (torch.full((4, 4), torch.nan), {}, "nan"),
    ],
)
def test_wrong_arguments_are_refused(weight: torch.Tensor, arguments: dict, match: str) -> None:
    with pytest.raises(QuantError, match=match):
        loftq(weight, **arguments)


@pytest.mark.parametrize("storage", ["float32", "double"])
@pytest.mark.parametrize("format", ["nf4", "uint2"])
@pytest.mark.parametrize("exponent", [100, 60, -60, -100])
def test_the_size_of_weights_does_not_matter(format: str, storage: str, exponent: int) -> None:
    """From 1e-30 to 1e30, where squares leave float32's range."""
    drawn = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).double()
    plain = loftq(drawn, format, 4, 3, 16, scale_storage=storage)
    found = loftq((drawn * 2.0**exponent).float(), format, 4, 3, 16, scale_storage=storage)
    assert found.errors == pytest.approx(plain.errors, rel=1e-3)
    product = found.lora_B.double() @ found.lora_A.double()
    missing = drawn - (found.quantized.dequantize(torch.float64) + product) * 2.0**-exponent
    assert float(missing.norm() / drawn.norm()) == pytest.approx(min(plain.errors), rel=1e-2)


def test_denormal_weights_get_adapters_too() -> None:
    drawn = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 1e-39
    found = loftq(drawn, "nf4", 8, 3, 16)
    assert 0.03 < min(found.errors) < 0.9 * found.errors[0]


def test_zero_iterations_start_from_the_same_kind_of_a_whatever_the_weight() -> None:
    large = loftq(torch.randn(48, 64) * 1e30, "nf4", 8, 0, 16)
    assert 1e-3 < float(large.lora_A.std()) < 1
    assert not large.lora_B.any()


@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (32, 32)])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("calibrated", [False, True])
def test_factors_lie_as_they_would_when_read_from_a_file(shape, iterations, calibrated) -> None:
    """Products of matrices of other strides round otherwise, so that a run gone on with would end elsewhere."""
    weight, inputs = torch.randn(shape), torch.randn(200, shape[1])
    covariance = inputs.T @ inputs / 200 if calibrated else None
    found = loftq(weight, "nf4", 4, iterations, 16, covariance=covariance)
    layer = QuantLinear.from_parts(found.quantized, None, found.lora_A, found.lora_B, scaling=2.0)
    of_views = QuantLinear(found.quantized, None, torch.randn(shape[1], 4).T, torch.randn(4, shape[0]).T)
    parameter = PackedParameter(found.quantized, of_views.lora_A.detach().T.contiguous().T, found.lora_B)
    layers = (layer, of_views, parameter)
    for factor in (found.lora_A, found.lora_B, *(factor for each in layers for factor in each.parameters())):
        assert factor.is_contiguous()
