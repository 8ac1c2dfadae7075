"""Perplexity, by one protocol for torch and onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphprune.errors import VerificationError
from graphprune.source.text import Windows

Logits = Callable[[Tensor], Tensor]


def perplexity(
    logits: Logits, windows: Windows, batch_size: int = 4, on_batch: Callable[[int], None] | None = None
) -> float:
    """Return exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        logits: From token ids (batch, window) to logits (batch, window, vocabulary).
        windows: What to predict.
        batch_size: Windows at a time.
        on_batch: Called with the number of windows just done.

    Raises:
        VerificationError: If the result is not finite.
    """
    total = 0.0
    for ids in windows.ids.split(batch_size):
        predicted = logits(ids)[:, :-1].float()
        total += float(
            nn.functional.cross_entropy(predicted.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        )
        if on_batch:
            on_batch(len(ids))
    result = math.exp(min(total / windows.tokens, 700.0))
    if not math.isfinite(result) or math.isnan(total):
        raise VerificationError(
            f"the perplexity on {windows.name} is {result}",
            "the model's outputs are broken: check its weights",
        )
    return result


def torch_logits(model: nn.Module) -> Logits:
    """Return the logits function of a causal language model."""

    def logits(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    return logits
