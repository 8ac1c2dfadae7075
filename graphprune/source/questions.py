"""Multiple-choice questions, answered zero-shot by log-likelihood as lm-evaluation-harness does it."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import SourceError

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Question:
    """One item: a context for each choice (mostly the same one), what follows it, and which choice is right."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of a task's questions were answered right.

    Attributes:
        count: Questions.
        right: Share answered right by the sum of log-likelihoods (`acc`).
        normalised: Likewise, per character of the choice (`acc_norm`).
        chance: Share that guessing gets right.
    """

    count: int
    right: float
    normalised: float
    chance: float

    @property
    def standard_error(self) -> float:
        """Standard error of `right`."""
        return math.sqrt(self.right * (1 - self.right) / max(1, self.count - 1))

    def kept(self, dense: Accuracy) -> float:
        """Return the share of the dense model's margin over chance that is left; nan where it has none."""
        margin = dense.right - dense.chance
        return (self.right - self.chance) / margin if margin > 0 else math.nan


def read_questions(path: Path, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Read a task's questions, or a random sample of them in the file's order.

    Args:
        path: A .jsonl or .jsonl.gz file; a record has ``gold`` and either ``context`` and ``choices``, or ``contexts``
            and one ``continuation``.
        limit: Questions at most.
        seed: Of the sample.

    Raises:
        SourceError: If the file cannot be read or a record is none.
    """
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = text.decode("utf-8").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read the questions in {path}: {error}", "give a .jsonl file") from error
    questions = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise SourceError(f"{path} holds no questions", "give one JSON record a line")
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def answer(
    logits: Logits,
    tokenizer: Any,
    questions: Sequence[Question],
    on_question: Callable[[int], None] | None = None,
) -> Accuracy:
    """Answer each question with the likeliest choice.

    A choice's tokens are those that follow when context, a space and choice are tokenized as one text; choices are
    padded on the right, which causal models do not look at.

    Args:
        logits: From token ids (choices, length) to logits (choices, length, vocabulary) of a causal model.
        tokenizer: A transformers tokenizer.
        questions: What to answer.
        on_question: Called with the number of questions done.
    """
    right = normalised = 0
    chance = 0.0
    for done, question in enumerate(questions, 1):
        likelihood = _log_likelihoods(logits, tokenizer, question)
        lengths = torch.tensor([max(1, len(text)) for text in question.continuations])
        right += int(likelihood.argmax()) == question.gold
        normalised += int((likelihood / lengths).argmax()) == question.gold
        chance += 1 / len(question.continuations)
        if on_question:
            on_question(done)
    count = len(questions)
    return Accuracy(count, right / count, normalised / count, chance / count)


def _log_likelihoods(logits: Logits, tokenizer: Any, question: Question) -> Tensor:
    pairs = zip(question.contexts, question.continuations, strict=True)
    starts, rows = zip(*(_encoded(tokenizer, *pair) for pair in pairs), strict=True)
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
    predicted = logits(ids)
    sums = []
    for index, (start, row) in enumerate(zip(starts, rows, strict=True)):
        log_likelihood = predicted[index, start - 1 : len(row) - 1].float().log_softmax(-1)
        sums.append(log_likelihood.gather(-1, ids[index, start : len(row), None]).sum())
    return torch.stack(sums).double()


def _encoded(tokenizer: Any, context: str, continuation: str) -> tuple[int, list[int]]:
    """Return where the continuation's tokens start, and all token ids."""
    whole = tokenizer(f"{context} {continuation}")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    return max(1, min(start, len(whole) - 1)), whole


def _question(line: str, place: str) -> Question:
    try:
        record = json.loads(line)
        gold = int(record["gold"])
        if "contexts" in record:
            contexts = tuple(record["contexts"])
            continuations = (str(record["continuation"]),) * len(contexts)
        else:
            continuations = tuple(record["choices"])
            contexts = (str(record["context"]),) * len(continuations)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{place} is no question: {error!r}", "a record has gold, context and choices"
        ) from error
    if not 0 <= gold < len(continuations) or len(continuations) < 2:
        raise SourceError(f"{place}: gold is {gold} of {len(continuations)} choices", "mend the record")
    return Question(contexts, continuations, gold)
