from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import SourceError, VerificationError
from graphprune.source.perplexity import perplexity
from graphprune.source.text import Windows, cut_windows, read_text


class Letters:
    """A tokenizer of letters; with `bos`, one that begins every text with a token of its own."""

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 1
        self.bos = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids] if self.bos and add_special_tokens else ids}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_every_kind_of_file_is_read(tmp_path, name):
    content = (
        json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"})
        if "jsonl" in name
        else "one\n\ntwo"
    )
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert "\n\n".join(read_text(str(path))) == "one\n\ntwo"


def test_a_relative_path_may_start_at_the_recipe(tmp_path):
    (tmp_path / "here.txt").write_text("words")
    assert read_text("here.txt", base=tmp_path) == ["words"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n ", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "cannot read"),
        ("a.jsonl", b'{"other": 1}', "a.jsonl:1 is not a record with field 'text'"),
        ("a.jsonl", b'{"text": "x"}\nnot json', "a.jsonl:2"),
        ("a.jsonl", b'{"text": 7}', "is not text"),
        ("a.csv", b"x", "is none of"),
        ("a.txt.gz", b"not gzip", "cannot read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_text(str(tmp_path / name))


def test_a_missing_text_is_an_error_without_asking_the_hub(tmp_path):
    with pytest.raises(SourceError, match="there is no text"):
        read_text(str(tmp_path / "none.jsonl"))


@given(st.integers(2, 9), st.integers(20, 60), st.booleans())
def test_windows_partition_the_text_from_its_start(window, length, bos):
    text = "".join(chr(97 + i % 26) for i in range(length))
    windows = cut_windows([text], Letters(bos), window=window, limit=None, name="letters")
    assert windows.ids.shape[1] == window
    body = windows.ids[:, 1:] if bos else windows.ids
    assert "".join(chr(i) for i in body.flatten().tolist()) == text[: body.numel()]
    assert length - body.numel() < body.shape[1]
    assert windows.tokens == len(windows) * (window - 1)


def test_a_text_too_short_for_one_window_says_how_long_it_is():
    with pytest.raises(SourceError, match="3 tokens, and one window takes 8"):
        cut_windows(["abc"], Letters(), window=8, limit=None, name="short.txt")


def test_batches_see_every_window_once_a_round_and_repeat_with_the_seed():
    windows = Windows(torch.arange(10).reshape(10, 1), "numbers")
    first, again = windows.batches(5, seed=3), windows.batches(5, seed=3)
    rows = [next(first).flatten().tolist() for _ in range(4)]
    assert [next(again).flatten().tolist() for _ in range(4)] == rows
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3]) == list(range(10))
    assert rows[:2] != rows[2:]


def test_perplexity_is_exp_of_the_mean_loss_over_predicted_tokens():
    """Against the definition in float64, at another batch size."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (5, 6), generator=generator)
    table = torch.randn(7, 7, generator=generator)
    windows = Windows(ids, "random")
    probabilities = table.double().softmax(-1)
    losses = [-math.log(probabilities[row[i], row[i + 1]]) for row in ids for i in range(5)]
    expected = math.exp(sum(losses) / len(losses))
    for size in (1, 2, 5):
        assert perplexity(lambda batch: table[batch], windows, size) == pytest.approx(expected, rel=1e-5)


def test_broken_logits_are_an_error_not_a_number():
    windows = Windows(torch.zeros(1, 4, dtype=torch.int64), "zeros")
    with pytest.raises(VerificationError, match="perplexity on zeros is nan"):
        perplexity(lambda ids: torch.full((1, 4, 3), float("nan")), windows)
