"""Multiple choice by log-likelihood."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphprune.errors import SourceError
from graphprune.source.questions import Accuracy, Question, answer, read_questions

VOCABULARY = 128
TEXTS = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=6)


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def bigram(seed: int) -> Any:
    """A language model that looks at one token, so that what it gives can be reckoned by hand."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return table, lambda ids: table[ids]


def by_hand(table: Tensor, context: str, continuation: str) -> float:
    text = f"{context} {continuation}"
    steps = range(len(context), len(text))
    logs = table.double().log_softmax(-1)
    return sum(float(logs[ord(text[i - 1]), ord(text[i])]) for i in steps)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=2, max_size=4), st.integers(0, 99))
def test_the_likeliest_choice_is_the_answer(context: str, choices: list[str], seed: int) -> None:
    table, logits = bigram(seed)
    sums = [by_hand(table, context, choice) for choice in choices]
    per_character = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
    for gold in range(len(choices)):
        question = Question((context,) * len(choices), tuple(choices), gold)
        found = answer(logits, Characters(), [question])
        if sum(math.isclose(total, max(sums), abs_tol=1e-3) for total in sums) == 1:
            assert found.right == (sums[gold] == max(sums))
        if sum(math.isclose(one, max(per_character), abs_tol=1e-3) for one in per_character) == 1:
            assert found.normalised == (per_character[gold] == max(per_character))
        assert found.chance == 1 / len(choices)


def test_contexts_may_differ_and_the_continuation_be_one() -> None:
    table, logits = bigram(3)
    contexts = ("ann", "bob")
    likelier = int(by_hand(table, "bob", "left") > by_hand(table, "ann", "left"))
    found = answer(logits, Characters(), [Question(contexts, ("left", "left"), likelier)])
    assert found.right == 1


def test_a_sample_is_in_order_and_repeatable(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl.gz"
    records = [{"context": str(i), "choices": ["a", "b"], "gold": i % 2} for i in range(20)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    first, again = read_questions(path, 7, seed=1), read_questions(path, 7, seed=1)
    numbers = [int(question.contexts[0]) for question in first]
    assert first == again
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 7
    assert numbers != [int(question.contexts[0]) for question in read_questions(path, 7, seed=2)]
    assert len(read_questions(path)) == 20


def test_error_and_what_is_kept() -> None:
    dense, small = Accuracy(101, 0.75, 0.7, 0.25), Accuracy(101, 0.5, 0.5, 0.25)
    assert small.standard_error == pytest.approx(0.05)
    assert small.kept(dense) == pytest.approx(0.5)
    assert math.isnan(dense.kept(Accuracy(101, 0.2, 0.2, 0.25)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no questions"),
        ("{", ":1 is no question"),
        ('{"context": "a", "choices": ["b", "c"]}', "gold"),
        ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2 of 2"),
        ('{"context": "a", "choices": ["b"], "gold": 0}', "of 1 choices"),
    ],
)
def test_bad_files_are_refused_by_place(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(content)
    with pytest.raises(SourceError, match=words):
        read_questions(path)


def test_the_shipped_tasks_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "examples" / "data" / "zero_shot"
    tasks = {path.name.split(".")[0]: read_questions(path) for path in sorted(folder.iterdir())}
    assert len(tasks) == 7
    assert all(len(questions) == 200 for questions in tasks.values())
