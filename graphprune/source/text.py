"""Opening text and cutting it into windows of tokens."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from graphprune.errors import SourceError

_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Windows:
    """Non-overlapping windows of one tokenized text.

    Attributes:
        ids: (windows, window) int64 token ids; each starts with the beginning-of-text token if the tokenizer adds one.
        name: Of the text, for people.
    """

    ids: Tensor
    name: str

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

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Yield batches (size, window) for ever, in a new random order each time round."""
        generator = random.Random(seed)
        order: list[int] = []
        while True:
            while len(order) < size:
                order.extend(generator.sample(range(len(self)), len(self)))
            yield self.ids[torch.tensor(order[:size])]
            del order[:size]


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
    path = _resolve(reference, base)
    documents = _read_file(path, field) if path else _read_hub(reference, field)
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
    prefix = _beginning(tokenizer)
    ids = tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    step = window - len(prefix)
    count = min(len(ids) // step, len(ids) if limit is None else limit)
    if count < 1:
        raise SourceError(
            f"'{name}' is too short: {len(ids)} tokens, and one window takes {step}",
            "give more text, or a smaller window in the recipe",
        )
    rows = [[*prefix, *ids[i * step : (i + 1) * step]] for i in range(count)]
    return Windows(torch.tensor(rows, dtype=torch.int64), name)


def _beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer itself puts before a text: some models need them badly."""
    first = tokenizer.bos_token_id
    encoded = tokenizer("a")["input_ids"]
    return [first] if first is not None and encoded[:1] == [first] else []


def _resolve(reference: str, base: Path | None) -> Path | None:
    candidates = [Path(reference).expanduser()]
    if base is not None:
        candidates.append(base / reference)
    for path in candidates:
        if path.is_file():
            return path.resolve()
    looks_local = reference.endswith(_SUFFIXES) or reference.startswith((".", "/", "~"))
    if looks_local or reference.count("/") != 1:
        raise SourceError(
            f"there is no text '{reference}'", f"give a file ({', '.join(_SUFFIXES)}) or a hub data set"
        )
    return None


def _read_file(path: Path, field: str) -> list[str]:
    if not path.name.endswith(_SUFFIXES):
        raise SourceError(f"{path} is none of {', '.join(_SUFFIXES)}", "convert it to one of them")
    try:
        with _opened(path) as file:
            if ".jsonl" not in path.name:
                return [file.read()]
            return [_record(line, field, path, number) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise SourceError(f"cannot read {path}: {error}", "give a UTF-8 text file") from error


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _record(line: str, field: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)[field]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}:{number} is not a record with field '{field}': {error!r}", "name the field in the recipe"
        ) from error
    if not isinstance(text, str):
        raise SourceError(f"{path}:{number}: field '{field}' is not text", "name the field in the recipe")
    return text


def _read_hub(reference: str, field: str) -> list[str]:
    import datasets

    name, _, split = reference.partition(":")
    try:
        return list(datasets.load_dataset(name, split=split or "train")[field])
    except Exception as error:
        raise SourceError(
            f"the data set '{reference}' could not be opened: {error}",
            "without a network, give a local file instead",
        ) from error
