"""The coding of ternary symbols loses nothing, and costs what QMoE's does."""

from __future__ import annotations

import heapq
import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ternary_symbols import coded, draw, entropy

from quant import QuantError
from quant.ternary import TernaryTensor, encode_ternary
from quant.ternary.dictionary import WORDS, best_longest, dictionary

# p(0), and the rate of the dictionary made for 0.885 as published (words of up to 14 pairs).
PUBLISHED = {0.95: 0.591, 0.90: 0.689, 0.885: 0.736, 0.85: 0.876, 0.80: 1.120, 0.70: 1.686, 0.50: 2.941}


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
