"""Ternary experts: the coding loses nothing, costs what QMoE's does, and the experts decode one at a time."""

from __future__ import annotations

import copy
import heapq
import itertools
import math
import pickle  # noqa: TID251 -- a user may pass a model to another process; no file of ours is written so
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from quant import QuantError, QuantizedTensor
from quant.ternary import (
    DecodedExperts,
    PackedExperts,
    TernaryConfig,
    TernaryTensor,
    collect_expert_inputs,
    encode_ternary,
    quantize_experts,
    replace_parameter_,
)
from quant.ternary.compensation import compensated_symbols
from quant.ternary.dictionary import WORDS, best_longest, dictionary
from quant.ternary.grid import row_grid

# p(0), and the rate of the dictionary made for 0.885 as published (words of up to 14 pairs).
PUBLISHED = {0.95: 0.591, 0.90: 0.689, 0.885: 0.736, 0.85: 0.876, 0.80: 1.120, 0.70: 1.686, 0.50: 2.941}


def draw(zeros: float, *shape: int, seed: int = 0) -> Tensor:
    """Independent symbols."""
    shares = [zeros, (1 - zeros) / 2, (1 - zeros) / 2]
    return torch.from_numpy(np.random.default_rng(seed).choice(3, p=shares, size=shape).astype(np.uint8))


def coded(symbols: Tensor, **how: Any) -> TernaryTensor:
    rows = symbols.shape[:-1]
    return encode_ternary(symbols, -torch.ones(rows), torch.ones(rows), **how)


def entropy(zeros: float) -> float:
    return -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)


def popped_words(zeros: int, longest: int) -> set[tuple[int, ...]]:
    """The words as the paper's code finds them: pop the most probable, push its nine extensions."""
    single = [2 * zeros, 1000 - zeros, 1000 - zeros]  # of 2000
    pairs = [
        ((a, b), (a > 0) + (b > 0), single[a] * single[b]) for a, b in itertools.product(range(3), repeat=2)
    ]
    heap: list[tuple[int, int, int, tuple[int, ...]]] = [(-(2000 ** (2 * longest)), 0, 0, ())]
    found: set[tuple[int, ...]] = set()
    while len(found) < WORDS:
        improbability, _, nonzero, word = heapq.heappop(heap)
        if word:
            found.add(word)
        if len(word) < 2 * longest:
            for pair, more, share in pairs:
                longer = word + pair
                heapq.heappush(heap, (improbability * share // 2000**2, len(longer), nonzero + more, longer))
    return found


@cache
def spelled_words(zeros: int, longest: int) -> list[list[int]]:
    words = dictionary(zeros, longest)
    ends = zip(words.starts.tolist(), words.lengths.tolist(), strict=True)
    symbols = words.symbols.tolist()
    return [symbols[start : start + length] for start, length in ends]


def slow_decode(tensor: TernaryTensor) -> list[list[int]]:
    """The definition, in plain Python: each row's codes name words, and the words end to end are the row."""
    spelled = spelled_words(tensor.zeros, tensor.longest)
    codes, rows = iter(tensor.codes.tolist()), []
    for count in tensor.row_codes.tolist():
        row = [symbol for _ in range(count) for symbol in spelled[next(codes)]]
        rows.append(row[: tensor.shape[-1]])
    assert next(codes, None) is None
    return rows


# The dictionary


def test_the_words_are_those_that_popping_the_most_probable_finds() -> None:
    assert {tuple(word) for word in spelled_words(885, 14)} == popped_words(885, 14)


@pytest.mark.parametrize(
    ("zeros", "longest"), [(340, 5), (340, 24), (500, 14), (885, 14), (950, 24), (990, 64)]
)
def test_a_dictionary_is_2_to_the_16_words_and_all_their_prefixes_and_suffixes(
    zeros: int, longest: int
) -> None:
    words = dictionary(zeros, longest)
    assert len(words.lengths) == WORDS
    assert words.lengths.min() == 2
    assert (words.lengths % 2 == 0).all()
    assert int(words.lengths.sum()) == len(words.symbols)
    spelled = {bytes(word) for word in spelled_words(zeros, longest)}
    assert len(spelled) == WORDS
    assert {bytes(pair) for pair in itertools.product(range(3), repeat=2)} <= spelled
    assert all(word[:-2] in spelled and word[2:] in spelled for word in spelled if len(word) > 2)


@pytest.mark.parametrize(("zeros", "longest"), [(339, 14), (991, 14), (885, 4), (885, 65)])
def test_a_dictionary_out_of_range_is_refused(zeros: int, longest: int) -> None:
    with pytest.raises(QuantError, match="per mille"):
        dictionary(zeros, longest)


# The coding


@settings(max_examples=50)
@given(
    rows=st.integers(0, 5),
    width=st.integers(0, 70),
    share=st.floats(0, 1),
    zeros=st.sampled_from([340, 700, 885, 990]),
    longest=st.sampled_from([5, 14, 64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_rows_come_back(rows: int, width: int, share: float, zeros: int, longest: int, seed: int) -> None:
    symbols = draw(share, rows, width, seed=seed)
    tensor = coded(symbols, zeros=zeros, longest=longest)
    assert torch.equal(tensor.symbols(), symbols)
    assert slow_decode(tensor) == symbols.tolist()
    assert len(tensor.codes) == int(tensor.row_codes.to(torch.int64).sum())


@given(zeros=st.floats(0.5, 0.99), seed=st.integers(0, 2**32 - 1))
def test_no_parse_has_fewer_codes(zeros: float, seed: int) -> None:
    row = draw(zeros, 60, seed=seed).tolist()
    words = dictionary(900, 14)
    fewest = [0] + [len(row)] * (len(row) // 2)
    for start in range(len(row) // 2):
        word = WORDS
        for stop in range(start, len(row) // 2):
            word = words.children[word, 3 * row[2 * stop] + row[2 * stop + 1]]
            if word < 0:
                break
            fewest[stop + 1] = min(fewest[stop + 1], fewest[start] + 1)
    tensor = coded(torch.tensor([row], dtype=torch.uint8), zeros=900, longest=14)
    assert len(tensor.codes) == fewest[-1]


def test_large_tensors_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.ternary.coding.SYMBOLS_AT_ONCE", 100)
    monkeypatch.setattr("quant.ternary.coding.ROWS_AT_ONCE", 3)
    symbols = draw(0.9, 11, 33)
    tensor = coded(symbols)
    assert torch.equal(tensor.symbols(), symbols)
    assert slow_decode(tensor) == symbols.tolist()


@pytest.mark.parametrize(("zeros", "rate"), PUBLISHED.items())
def test_the_published_rates(zeros: float, rate: float) -> None:
    symbols = draw(zeros, 64, 4096)
    published = coded(symbols, zeros=885, longest=14)
    assert published.code_bits == pytest.approx(rate, rel=0.03)
    # A dictionary of the tensor's own p(0) never costs more, nor much more than the entropy.
    own = coded(symbols)
    assert entropy(zeros) < own.code_bits <= 1.001 * published.code_bits
    assert own.code_bits < 1.07 * entropy(zeros) + 0.08


def test_ternary_codes_never_need_much_more_than_base_3() -> None:
    assert coded(draw(1 / 3, 64, 4096)).code_bits < 1.61
    assert coded(torch.ones(64, 4096, dtype=torch.uint8)).code_bits < 1.61


def test_zeros_cost_one_code_a_longest_word() -> None:
    tensor = coded(torch.zeros(3, 1280, dtype=torch.uint8))
    assert tensor.row_codes.tolist() == [1280 // (2 * best_longest(tensor.zeros))] * 3
    assert not tensor.dequantize().any()


def test_bits_a_weight_count_all_that_is_stored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensor = coded(draw(0.9, 4, 16, 256))
    stored = tensor.codes.numel() * 2 + 64 * 2 + 64 * 2 * 2
    assert tensor.nbytes == stored
    assert tensor.bits_per_weight == 8 * stored / (4 * 16 * 256)
    save_file(tensor.state_dict(), tmp_path / "experts.safetensors")
    same = TernaryTensor.from_state_dict(load_file(tmp_path / "experts.safetensors"))
    assert torch.equal(same.dequantize(), tensor.dequantize())
    assert (same.zeros, same.longest, same.shape) == (tensor.zeros, tensor.longest, tensor.shape)


def test_an_expert_is_decoded_alone() -> None:
    symbols = draw(0.8, 5, 7, 33)
    low, high = -torch.rand(5, 7), torch.rand(5, 7)
    tensor = encode_ternary(symbols, low, high)
    whole = tensor.dequantize()
    for expert in range(5):
        assert torch.equal(tensor.dequantize(expert=expert), whole[expert])
    expected = np.choose(
        symbols.numpy(),
        [np.zeros((5, 7, 1)), *(x.bfloat16().double().numpy()[..., None] for x in (low, high))],
    )
    np.testing.assert_array_equal(whole.double().numpy(), expected)
    assert torch.equal(tensor.dequantize(torch.bfloat16).float(), whole)
    with pytest.raises(QuantError, match="no expert 5 among 5"):
        tensor.dequantize(expert=5)


def test_damaged_codes_are_found() -> None:
    tensor = coded(draw(0.9, 4, 64))
    parts = {**tensor.parts(), "codes": torch.zeros_like(tensor.codes)}
    damaged = TernaryTensor.from_parts(parts, shape=tensor.shape, zeros=tensor.zeros, longest=tensor.longest)
    with pytest.raises(QuantError, match="do not stand for 4 rows of 64"):
        damaged.dequantize()
    with pytest.raises(QuantError, match="not those of ternary weights"):
        TernaryTensor.from_parts({**parts, "levels": tensor.levels[:3]}, shape=(4, 64), zeros=900, longest=14)
    with pytest.raises(QuantError, match="counted in rows"):
        TernaryTensor.from_parts({**parts, "codes": tensor.codes[1:]}, shape=(4, 64), zeros=900, longest=14)
    with pytest.raises(QuantError, match="lacks levels"):
        TernaryTensor.from_parts(
            {"codes": tensor.codes, "row_codes": tensor.row_codes}, shape=(4, 64), zeros=900, longest=14
        )
    with pytest.raises(QuantError, match="lacks dictionary"):
        TernaryTensor.from_state_dict({k: v for k, v in tensor.state_dict().items() if k != "dictionary"})


# Rounding


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


# The choice


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


# Experts on demand


class Mixture(nn.Module):
    """A mixture of experts as it is written everywhere: a stacked parameter, read expert by expert."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, width))
        self.down = nn.Parameter(torch.randn(experts, width, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        output = torch.zeros_like(tokens)
        for expert in chosen.unique():
            here = chosen == expert
            hidden = functional.linear(tokens[here], self.up[expert]).relu()
            output[here] = gate[here, None] * functional.linear(hidden, self.down[expert])
        return output


def packed_mixture(decoded: DecodedExperts | None = None) -> tuple[Mixture, Mixture]:
    """Return a mixture of packed experts, and one of the same weights, dense."""
    torch.manual_seed(0)
    packed = Mixture(6, 32, 48)
    dense = copy.deepcopy(packed)
    for name in ("up", "down"):
        weight = packed.get_parameter(name)
        config = TernaryConfig(block_size=16, scale_storage="float32")
        quantized = quantize_experts(weight, config=config).quantized
        assert isinstance(quantized, TernaryTensor)
        replace_parameter_(packed, name, PackedExperts(quantized, decoded=decoded))
        dense.get_parameter(name).data = quantized.dequantize()
    return packed, dense


@pytest.mark.parametrize("kept", [3, 12])
def test_a_mixture_runs_on_packed_experts(kept: int) -> None:
    decoded = DecodedExperts(kept * 32 * 48 * 4)
    packed, dense = packed_mixture(decoded)
    tokens = torch.randn(20, 32, requires_grad=True)
    with torch.inference_mode():
        packed(tokens)
    torch.testing.assert_close(packed(tokens), dense(tokens), rtol=0, atol=0)
    assert decoded.nbytes <= decoded.most_bytes
    gradients = [torch.autograd.grad(model(tokens).sum(), tokens)[0] for model in (packed, dense)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert [name for name, _ in packed.named_parameters()] == ["router.weight"]


def test_the_inputs_of_each_expert_are_summed() -> None:
    torch.manual_seed(0)
    model = Mixture(6, 32, 48)
    batches = [torch.randn(30, 32), torch.randn(20, 32)]
    found = collect_expert_inputs(model, batches, ["up", "down"])
    tokens = torch.cat(batches)
    chosen = model.router(tokens).argmax(-1)
    for expert in range(6):
        inputs = tokens[chosen == expert]
        hidden = (inputs @ model.up[expert].T).relu().detach()
        for name, expected in (("up", inputs), ("down", hidden)):
            assert int(found[name].tokens[expert]) == len(expected)
            torch.testing.assert_close(
                found[name].covariance[expert], expected.T @ expected, rtol=1e-4, atol=1e-3
            )
    result = quantize_experts(model.up, found["up"].covariance, found["up"].tokens)
    assert result.report.compensated == int((found["up"].tokens >= TernaryConfig().fewest_tokens).sum())
    with pytest.raises(QuantError, match="was given to linear"):
        collect_expert_inputs(model, [], ["up"])
    with pytest.raises(QuantError, match="not a stack of experts"):
        collect_expert_inputs(model, batches, ["router.weight"])


def test_the_last_used_experts_are_kept_within_the_bound() -> None:
    decoded = DecodedExperts(250)
    made: list[int] = []

    def ask(owner: object, expert: int) -> None:
        decoded.get(owner, expert, lambda: made.append(expert) or torch.zeros(25))  # type: ignore[func-returns-value]

    one, other = object(), object()
    for expert in (0, 1, 0, 2, 0, 1):
        ask(one, expert)
        assert decoded.nbytes <= 250
    assert made == [0, 1, 2, 1]
    ask(other, 0)
    decoded.drop(other)
    ask(one, 1)
    assert made == [0, 1, 2, 1, 0]
    assert decoded.nbytes == 100


def test_an_expert_larger_than_the_bound_is_not_kept() -> None:
    decoded = DecodedExperts(100)
    small = decoded.get(decoded, 0, lambda: torch.ones(20))
    assert decoded.get(decoded, 1, lambda: torch.ones(26)).sum() == 26
    assert decoded.nbytes == 80
    assert decoded.get(decoded, 0, lambda: torch.ones(20)) is small


def test_casts_leave_what_is_stored_and_change_what_is_decoded() -> None:
    packed, dense = packed_mixture(DecodedExperts(1 << 20))
    stored = {
        name: buffer.clone()
        for name, buffer in packed.state_dict().items()
        if "." in name and "router" not in name
    }
    assert packed.up[0].dtype == torch.float32
    packed.to(torch.float16)
    assert packed.up[0].dtype == torch.float16
    after = packed.state_dict()
    assert all(
        torch.equal(after[name], buffer) and after[name].dtype == buffer.dtype
        for name, buffer in stored.items()
    )
    packed.float()
    torch.testing.assert_close(packed.up.dequantize(), dense.up.data, rtol=0, atol=0)
    torch.testing.assert_close(packed.up[torch.tensor([3, 1])], dense.up.data[[3, 1]], rtol=0, atol=0)


def test_a_copy_keeps_its_own_experts() -> None:
    decoded = DecodedExperts(1 << 20)
    packed, dense = packed_mixture(decoded)
    packed.up[0]
    twin = copy.deepcopy(packed)
    twin.up.levels.zero_()
    twin.up.load_state_dict(twin.up.state_dict())
    assert not twin.up[0].any()
    assert torch.equal(packed.up[0], dense.up[0])


def test_experts_are_counted_and_iterated_as_a_parameters_are() -> None:
    packed, dense = packed_mixture()
    assert len(packed.up) == len(dense.up) == 6
    assert [torch.equal(one, other) for one, other in zip(packed.up, dense.up, strict=True)] == [True] * 6
    for index in (torch.tensor(4), np.int64(4), torch.tensor([[1, 4], [0, 4]])):
        assert torch.equal(packed.up[index], dense.up[index])


@pytest.mark.parametrize("index", [slice(1, 3), (1, 2), None, 1.0, torch.ones(6) > 0, torch.tensor(1.5)])
def test_what_is_no_number_of_an_expert_is_refused(index: Any) -> None:
    packed, _ = packed_mixture()
    with pytest.raises(QuantError, match="is no number of an expert"):
        packed.up[index]


def test_packed_experts_are_pickled_with_their_bits_and_without_what_was_decoded() -> None:
    decoded = DecodedExperts(1 << 20)
    packed, dense = packed_mixture(decoded)
    packed.up[0]
    packed.half()
    packed.up[1]
    assert decoded.nbytes
    written = pickle.dumps(packed)
    again = pickle.loads(written)  # noqa: S301 -- written above
    state = packed.state_dict()
    assert state["up.codes"].dtype == torch.uint16
    for name, held in again.state_dict().items():
        assert held.dtype == state[name].dtype
        assert torch.equal(held, state[name])
    assert torch.equal(again.up[2], dense.up[2].half())
    assert again.up.decoded.most_bytes == decoded.most_bytes
    assert again.up.decoded.nbytes == again.up[2].nbytes
    # The one that is left goes on as it was.
    assert torch.equal(packed.up[2], dense.up[2].half())
    tensor = pickle.loads(pickle.dumps(packed.up.quantized))  # noqa: S301 -- as above
    assert torch.equal(tensor.dequantize(), dense.up)


@pytest.mark.parametrize("columns", [32, 31], ids=["whole blocks", "blocks cross experts"])
def test_two_bit_experts_are_served_too(columns: int) -> None:
    weight = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(0))
    result = quantize_experts(weight, config=TernaryConfig(most_bits=0.1, block_size=16))
    packed = PackedExperts(result.quantized)
    for expert in range(3):
        assert torch.equal(packed[expert], result.quantized.dequantize()[expert])


def test_the_state_of_other_dictionaries_is_refused() -> None:
    packed, _ = packed_mixture()
    ours = packed.up.quantized
    other = PackedExperts(TernaryTensor(**ours.parts(), shape=ours.shape, zeros=999, longest=ours.longest))
    with pytest.raises(
        QuantError, match=rf"format ternary \(zeros {ours.zeros}, .* the layer is .*zeros 999"
    ):
        other.load_state_dict(packed.up.state_dict())
    packed.up.load_state_dict(packed.up.state_dict())


def test_a_forward_that_wants_one_tensor_is_told_what_to_do() -> None:
    packed, _ = packed_mixture()
    with pytest.raises(AttributeError, match="read them one by one"):
        packed.up.transpose(1, 2)
    with pytest.raises(QuantError, match="no expert 6 among 6"):
        packed.up[6]
    with pytest.raises(QuantError, match="not one of shape"):
        replace_parameter_(packed, "router", packed.up)
    assert "bits a weight" in repr(packed)


def test_qwen3_moe_of_transformers_runs_on_packed_experts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=48,
        moe_intermediate_size=64,
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=67,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    dense, decoded = copy.deepcopy(model), DecodedExperts(4 * 48 * 64 * 4)
    tokens = torch.arange(60).view(4, 15)
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    inputs = collect_expert_inputs(model, [tokens], names)
    assert all(int(inputs[name].tokens.sum()) == 2 * tokens.numel() for name in names)
    before = sum(model.get_parameter(name).nbytes for name in names)
    for name in names:
        seen = inputs[name]
        how = TernaryConfig(block_size=16, scale_storage="float32")
        result = quantize_experts(model.get_parameter(name), seen.covariance, seen.tokens, how, name)
        assert result.report.format == "ternary"
        assert result.report.compensated
        path, _, last = name.rpartition(".")
        replace_parameter_(model.get_submodule(path), last, PackedExperts(result.quantized, decoded=decoded))
        dense.get_parameter(name).data = result.quantized.dequantize()
    after = sum(buffer.nbytes for name, buffer in model.named_buffers() if ".experts." in name)
    assert after < before / 12
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=0, atol=0)
    assert 0 < decoded.nbytes <= decoded.most_bytes
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad(), pytest.raises(AttributeError, match="experts_implementation='eager'"):
        model(tokens)
