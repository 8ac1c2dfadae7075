"""Instructions are context, answers are learned: labels against ones made by hand."""

from __future__ import annotations

import gzip
import json

import pytest
from instructions import TEMPLATE, tiny_tokenizer

from graphprune.errors import SourceError
from graphprune.source.instructions import Exchange, cut_exchanges, read_exchanges
from graphprune.source.text import IGNORED

EXCHANGES = [Exchange("the cat", "sat on the mat"), Exchange("a dog", "ran")]


def shown(windows, tokenizer):
    """Each window's tokens, and those of them that are learned, as words."""
    words = tokenizer.convert_ids_to_tokens
    return [
        (words(ids), [words(label) if label != IGNORED else "-" for label in labels])
        for ids, labels in zip(windows.ids.tolist(), windows.labels.tolist(), strict=True)
    ]


def test_without_a_chat_template_the_layout_is_alpacas():
    tokenizer = tiny_tokenizer()
    rows = shown(cut_exchanges(EXCHANGES, tokenizer, window=16, name="asked"), tokenizer)
    tokens = "### Instruction : the cat ### Response : sat on the mat </s> <pad> <pad> <pad>"
    learned = "- - - - - - - - sat on the mat </s> - - -"
    assert rows[0] == (tokens.split(), learned.split())
    assert rows[1][1] == "- - - - - - - - ran </s> - - - - - -".split()


def test_a_chat_template_lays_out_prompt_and_response():
    tokenizer = tiny_tokenizer(TEMPLATE)
    rows = shown(cut_exchanges(EXCHANGES, tokenizer, window=15, name="asked"), tokenizer)
    tokens = "<s> user : the cat </s> <s> assistant : sat on the mat </s> <pad>"
    assert rows[0] == (tokens.split(), "- - - - - - - - - sat on the mat </s> -".split())


def test_what_does_not_fit_is_cut_at_its_end_and_left_out_without_any_response():
    tokenizer = tiny_tokenizer()
    rows = shown(cut_exchanges(EXCHANGES, tokenizer, window=10, name="asked"), tokenizer)
    assert rows[0][1] == "- - - - - - - - sat on".split()
    long = Exchange("the cat sat on the mat", "a dog")
    assert len(cut_exchanges([long, EXCHANGES[1]], tokenizer, window=10, name="asked")) == 1
    with pytest.raises(SourceError, match="no response in 'asked' begins within 10 tokens"):
        cut_exchanges([long], tokenizer, window=10, name="asked")


def test_a_template_that_does_not_continue_its_prompt_is_refused():
    tokenizer = tiny_tokenizer("{{ messages | length }}")
    with pytest.raises(SourceError, match="does not continue its own prompt"):
        cut_exchanges(EXCHANGES, tokenizer, window=10, name="asked")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_all_names_of_prompt_and_response_are_read(tmp_path, name):
    rows = [
        {"instruction": "one", "input": "more", "output": "1"},
        {"prompt": "two", "response": "2", "input": ""},
    ]
    content = "\n\n".join(map(json.dumps, rows)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_exchanges(name, tmp_path) == [Exchange("one\n\nmore", "1"), Exchange("two", "2")]


def test_other_data_has_no_exchanges(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "plain"}\n["list"]\n')
    (tmp_path / "a.txt").write_text("plain")
    assert read_exchanges("a.jsonl", tmp_path) == read_exchanges("a.txt", tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}',
            r"row 2 of 'a\.jsonl' has no prompt",
        ),
        ('{"prompt": "a"', "cannot read"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SourceError, match=message):
        read_exchanges("a.jsonl", tmp_path)
