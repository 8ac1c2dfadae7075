"""What a model was found to be worth: perplexity on a text, accuracy on tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from graphprune.source.questions import Accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """Perplexity on a text.

    Attributes:
        text: Its name.
        perplexity: By the protocol of `graphprune.source.perplexity`.
        tokens: How many were predicted.
        window: Tokens of a window.
    """

    text: str
    perplexity: float
    tokens: int
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model was found to be worth.

    Attributes:
        model: The file.
        provider: What computed.
        text: Its perplexity; None if no text was there to judge by.
        tasks: Accuracy by the task's name.
    """

    model: str
    provider: str
    text: TextScore | None
    tasks: dict[str, Accuracy]

    def row(self) -> dict[str, Any]:
        """Return all numbers, for JSON."""
        return {
            "schema": "graphprune.evaluation/1",
            "model": self.model,
            "provider": self.provider,
            "text": None if self.text is None else asdict(self.text),
            "tasks": {
                name: {**asdict(found), "standard_error": found.standard_error}
                for name, found in self.tasks.items()
            },
        }
