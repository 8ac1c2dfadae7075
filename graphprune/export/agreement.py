"""Next-token predictions of one model against another's, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from graphprune.export.check import Check
from graphprune.export.runtime import Array, Integers

LEAST_TOP1 = 0.8
LARGEST_KL = 0.1

Logits = Callable[[Integers], Array]
"""From token ids (rows, tokens) to logits (rows, tokens, vocabulary)."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a model's predictions are from another's.

    Attributes:
        max_abs_error: Largest difference of a logit.
        top1_agreement: Share of tokens for which both rank the same token first.
        kl: Mean Kullback-Leibler divergence, in nats a token.
        tokens: Tokens over which the three were taken.
    """

    max_abs_error: float
    top1_agreement: float
    kl: float
    tokens: int

    @property
    def checks(self) -> list[Check]:
        """The numbers with their bounds."""
        return [
            Check("max_abs_error", self.max_abs_error, None),
            Check("top1_agreement", self.top1_agreement, LEAST_TOP1, at_least=True),
            Check("kl", self.kl, LARGEST_KL),
        ]

    def row(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "max_abs_error": self.max_abs_error,
            "top1_agreement": self.top1_agreement,
            "kl": self.kl,
            "tokens": self.tokens,
        }


def measure_agreement(found: Logits, reference: Logits, texts: Sequence[Integers]) -> Agreement:
    """Compare two models, both as they are.

    Args:
        found: The model that is judged.
        reference: What it is judged by.
        texts: Token ids, each (rows, tokens).
    """
    errors, agreeing, divergence, tokens = [0.0], 0, 0.0, 0
    for ids in texts:
        one, other = (torch.from_numpy(logits(ids)).double() for logits in (found, reference))
        errors.append(float((one - other).abs().max()))
        agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
        log_q, log_p = one.log_softmax(-1), other.log_softmax(-1)
        divergence += float(functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        tokens += ids.size
    # torch's maximum is nan if any number is; Python's is not.
    return Agreement(float(torch.tensor(errors).max()), agreeing / tokens, divergence / tokens, tokens)
