"""Opening text and cutting it into windows of tokens."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from graphprune.errors import SourceError
from graphprune.source.location import TEXT_SUFFIXES, find_text

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows to learn from at once, where not every token is one to learn.

    Attributes:
        ids: (batch, window) token ids.
        labels: (batch, window) the same, and `IGNORED` where a token is context alone.
    """

    ids: Tensor
    labels: Tensor

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.ids[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(self.ids.to(device), self.labels.to(device))

    @property
    def counted(self) -> int:
        """How many tokens are learned."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def trimmed(self) -> Batch:
        """Without the columns after the last token that is learned: a causal model never looks at them."""
        columns = (self.labels != IGNORED).any(0).nonzero()
        end = int(columns[-1]) + 1 if len(columns) else 1
        return Batch(self.ids[:, :end], self.labels[:, :end])


@dataclass(frozen=True, slots=True)
class Windows:
    """Non-overlapping windows of one tokenized text.

    Attributes:
        ids: (windows, window) int64 token ids; each starts with the beginning-of-text token if the tokenizer adds one.
        name: Of the text, for people.
        labels: (windows, window) the same with `IGNORED` where a token is not to be learned; None if all are.
    """

    ids: Tensor
    name: str
    labels: Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def tokens(self) -> int:
        """How many tokens a model is asked to predict: all but the first of each window."""
        return len(self) * (int(self.ids.shape[1]) - 1)

    def drawn(self, count: int, seed: int) -> Tensor:
        """Return up to `count` windows at random: (count, window)."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.ids[order[:count]]

    def order(self, seed: int) -> Iterator[int]:
        """Yield numbers of windows for ever: each once in a random order, then again in another."""
        generator = random.Random(seed)
        while True:
            yield from generator.sample(range(len(self)), len(self))

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Yield batches (size, window) for ever, in a new random order each time round."""
        order = self.order(seed)
        while True:
            yield self.ids[torch.tensor(list(islice(order, size)))]

    def chosen(self, rows: Tensor) -> Windows:
        """Return some of the windows.

        Args:
            rows: Their numbers, or a mask.
        """
        return Windows(self.ids[rows], self.name, None if self.labels is None else self.labels[rows])

    @property
    def batch(self) -> Batch:
        """All windows as one batch."""
        return Batch(self.ids, self.ids if self.labels is None else self.labels)


def read_text(reference: str, field: str = "text", base: Path | None = None) -> list[str]:
    """Read the documents of a text.

    Args:
        reference: A file (.txt, .jsonl, either with .gz) or a hub data set as ``owner/name`` or ``owner/name:split``.
        field: Which field of a record holds the text.
        base: Folder that a relative path may start from, beside the current one.

    Returns:
        Non-empty documents in order; a .txt file is one document.

    Raises:
        SourceError: If it cannot be read, or holds no text.
    """
    path = find_text(reference, base)
    documents = _read_file(path, field) if path else read_hub(reference, field)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SourceError(f"'{reference}' holds no text in field '{field}'", "name the field that holds it")
    return documents


def cut_windows(
    documents: Sequence[str], tokenizer: Any, *, window: int, limit: int | None, name: str
) -> Windows:
    """Join documents by blank lines, tokenize once, and cut non-overlapping windows from the start.

    Args:
        documents: The texts.
        tokenizer: A transformers tokenizer.
        window: Tokens a window.
        limit: Windows at most; None for all that fit.
        name: Of the text, for messages.

    Raises:
        SourceError: If the text is too short for one window.
    """
    prefix = beginning(tokenizer)
    ids = tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    step = window - len(prefix)
    count = min(len(ids) // step, len(ids) if limit is None else limit)
    if count < 1:
        raise SourceError(
            f"'{name}' is too short: {len(ids)} tokens, and one window takes {step}",
            "give more text, or a smaller window (recipe: data.window, data.evaluate_window)",
        )
    rows = [[*prefix, *ids[i * step : (i + 1) * step]] for i in range(count)]
    return Windows(torch.tensor(rows, dtype=torch.int64), name)


def beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer itself puts before a text: some models need them badly."""
    first = tokenizer.bos_token_id
    encoded = tokenizer("a")["input_ids"]
    return [first] if first is not None and encoded[:1] == [first] else []


def _read_file(path: Path, field: str) -> list[str]:
    if not path.name.endswith(TEXT_SUFFIXES):
        raise SourceError(f"{path} is none of {', '.join(TEXT_SUFFIXES)}", "convert it to one of them")
    try:
        with open_file(path) as file:
            if ".jsonl" not in path.name:
                return [file.read()]
            return [_record(line, field, path, number) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise SourceError(f"cannot read {path}: {error}", "give a UTF-8 text file") from error


def open_file(path: Path) -> TextIO:
    """Open a text file for reading, unpacked if need be."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _record(line: str, field: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)[field]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}:{number} is not a record with field '{field}': {error!r}",
            "name the field (recipe: data.field)",
        ) from error
    if not isinstance(text, str):
        raise SourceError(
            f"{path}:{number}: field '{field}' is not text", "name the field (recipe: data.field)"
        )
    return text


def read_hub(reference: str, field: str | None) -> list[Any]:
    """Return one field of a hub data set's rows, or whole rows if that is None.

    Raises:
        SourceError: If it cannot be opened, or has no such field.
    """
    import datasets

    name, _, split = reference.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
        return list(rows if field is None else rows[field])
    except Exception as error:
        raise SourceError(
            f"the data set '{reference}' could not be opened: {error}",
            "without a network, give a local file instead",
        ) from error
