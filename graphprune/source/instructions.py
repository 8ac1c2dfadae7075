"""Instructions with their answers, as windows in which only the answers are learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import SourceError
from graphprune.source.location import find_text
from graphprune.source.text import IGNORED, Windows, beginning, open_file, read_hub

_ASKED, _ANSWERED = ("instruction", "prompt"), ("response", "output")


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was asked, and what is to be answered."""

    prompt: str
    response: str

    def __str__(self) -> str:
        return f"{self.prompt}\n\n{self.response}"


def read_exchanges(reference: str, base: Path | None = None) -> list[Exchange]:
    """Read instruction data.

    Args:
        reference: A .jsonl file (also .gz) or a hub data set. A row has ``instruction`` or ``prompt``, perhaps an
            ``input`` that belongs to it, and ``response`` or ``output``.
        base: Folder that a relative path may start from, beside the current one.

    Returns:
        The exchanges in order; none if the rows are not of this shape: plain text is read by `read_text`.

    Raises:
        SourceError: If it cannot be read, or only some rows are of this shape.
    """
    rows = _rows(reference, base)
    found = [_exchange(row) for row in rows]
    if not any(found):
        return []
    for number, exchange in enumerate(found, 1):
        if exchange is None:
            raise SourceError(
                f"row {number} of '{reference}' has no prompt and response as others have",
                f"give every row {' or '.join(_ASKED)}, and {' or '.join(_ANSWERED)}",
            )
    return [exchange for exchange in found if exchange]


def cut_exchanges(exchanges: Sequence[Exchange], tokenizer: Any, *, window: int, name: str) -> Windows:
    """Make one window of each exchange, in which all but the response and the end after it is ignored.

    The layout is the tokenizer's chat template if it has one, else Alpaca's (Taori et al. 2023). Prompt and response
    are tokenized apart, so that the border between them is exact. What does not fit the window is cut off at its end;
    an exchange whose response would not begin in it is left out.

    Args:
        exchanges: From `read_exchanges`.
        tokenizer: A transformers tokenizer.
        window: Tokens a window; shorter exchanges are filled up after their end.
        name: Of the text, for messages.

    Raises:
        SourceError: If no response begins within the window.
    """
    laid_out = [_layout(exchange, tokenizer) for exchange in exchanges]
    prompts, responses = (
        tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        for texts in zip(*laid_out, strict=True)
    )
    prefix = [] if tokenizer.chat_template else beginning(tokenizer)
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    rows, labels = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        context = [*prefix, *prompt]
        ids = [*context, *response][:window]
        if 0 < len(context) < len(ids):
            rest = window - len(ids)
            rows.append(ids + [filler] * rest)
            labels.append([IGNORED] * len(context) + ids[len(context) :] + [IGNORED] * rest)
    if not rows:
        raise SourceError(
            f"no response in '{name}' begins within {window} tokens", "raise window (recipe: data.window)"
        )
    return Windows(torch.tensor(rows, dtype=torch.int64), name, torch.tensor(labels, dtype=torch.int64))


def _rows(reference: str, base: Path | None) -> list[Any]:
    path = find_text(reference, base)
    if path is None:
        return read_hub(reference, None)
    if ".jsonl" not in path.name:
        return []
    try:
        with open_file(path) as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"cannot read {path}: {error}", "give one JSON object a line, in UTF-8") from error


def _exchange(row: Any) -> Exchange | None:
    asked, answered = _first(row, _ASKED), _first(row, _ANSWERED)
    if asked is None or answered is None:
        return None
    belongs = _first(row, ("input",))
    return Exchange(f"{asked}\n\n{belongs}" if belongs else asked, answered)


def _first(row: Any, names: tuple[str, ...]) -> str | None:
    if not isinstance(row, Mapping):
        return None
    return next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), None)


def _layout(exchange: Exchange, tokenizer: Any) -> tuple[str, str]:
    """Return the texts of the prompt and of the response with their markers."""
    if not tokenizer.chat_template:
        asked = f"### Instruction:\n{exchange.prompt}\n\n### Response:\n"
        return asked, f"{exchange.response}{tokenizer.eos_token or ''}"
    turns = [
        {"role": "user", "content": exchange.prompt},
        {"role": "assistant", "content": exchange.response},
    ]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(asked):
        raise SourceError(
            "the tokenizer's chat template does not continue its own prompt with the response",
            "give the source as plain text, laid out as the model expects it",
        )
    return asked, whole[len(asked) :]
