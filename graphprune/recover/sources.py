"""The texts that recovery mixes, each with a slice held out to see what the model has forgotten of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from graphprune.errors import RecipeError, SourceError
from graphprune.recipe import RecoverySource
from graphprune.source.instructions import cut_exchanges, read_exchanges
from graphprune.source.text import Windows, cut_windows, read_text

Phase = Literal["text", "instruct"]


@dataclass(frozen=True, slots=True)
class Source:
    """A named text.

    Attributes:
        name: For the mix, the report and messages.
        kind: Which phase it belongs to: all ``text`` comes before all ``instruct``.
        train: Windows to learn from.
        held_out: Windows that are never learned from; None if the text is not measured.
    """

    name: str
    kind: Phase
    train: Windows
    held_out: Windows | None


@dataclass(frozen=True, slots=True)
class Text:
    """What a recipe's source holds: its documents, and the windows cut from them."""

    documents: list[str]
    windows: Windows


def open_text(settings: RecoverySource, tokenizer: Any, *, window: int, base: Path) -> Text:
    """Read and cut one source.

    Args:
        settings: Its entry in the recipe.
        tokenizer: A transformers tokenizer.
        window: Tokens a window.
        base: The recipe's folder; a relative path may start there.

    Raises:
        SourceError: If it cannot be read, is too short, or holds no instructions though it should.
    """
    if settings.kind == "instruct":
        exchanges = read_exchanges(settings.path, base)
        if not exchanges:
            raise SourceError(
                f"source '{settings.name}' is of kind instruct, and has no rows with a prompt and a response",
                "make its kind text, to learn all of it, or give .jsonl rows with prompt and response",
            )
        windows = cut_exchanges(exchanges, tokenizer, window=window, name=settings.name)
        return Text([str(exchange) for exchange in exchanges], windows)
    documents = read_text(settings.path, settings.field, base)
    return Text(documents, cut_windows(documents, tokenizer, window=window, limit=None, name=settings.name))


def hold_out(windows: Windows, count: int, seed: int) -> Windows:
    """Return `count` windows, drawn uniformly (LoRAShear, Alg. 5).

    Raises:
        SourceError: If nothing would be left to learn from.
    """
    if len(windows) <= count:
        raise SourceError(
            f"'{windows.name}' has {len(windows)} windows, and {count} are to be held out",
            "give more text, or lower its hold_out (recipe: recover.sources)",
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows.chosen(order[:count].sort().values)


def without(windows: Windows, held_out: Sequence[Windows]) -> Windows:
    """Return the windows that are not among those held out, of whatever source, nor their duplicates.

    Raises:
        SourceError: If none is left.
    """
    forbidden = {row for held in held_out for row in _rows(held)}
    rows = torch.tensor([row not in forbidden for row in _rows(windows)])
    if not bool(rows.any()):
        raise SourceError(
            f"every window of '{windows.name}' is also held out to be measured on",
            "give other text, or lower hold_out (recipe: recover.sources)",
        )
    return windows if bool(rows.all()) else windows.chosen(rows)


def split_sources(
    settings: Sequence[RecoverySource], texts: Sequence[Windows], seed: int
) -> tuple[Source, ...]:
    """Split every source in windows to learn from and windows to measure on.

    Args:
        settings: The recipe's entries.
        texts: The windows of each.
        seed: Of what is held out.

    Raises:
        RecipeError: If two sources have one name.
        SourceError: If a source is too short.
    """
    names = [entry.name for entry in settings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"recover.sources: two are named '{twice[0]}'", "give each a name of its own")
    held = [hold_out(windows, entry.hold_out, seed) for entry, windows in zip(settings, texts, strict=True)]
    return tuple(
        Source(entry.name, entry.kind, without(windows, held), slice_)
        for entry, windows, slice_ in zip(settings, texts, held, strict=True)
    )


def _rows(windows: Windows) -> list[bytes]:
    return [row.tobytes() for row in windows.ids.numpy()]
