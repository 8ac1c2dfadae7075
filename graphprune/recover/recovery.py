"""Recovery: the adapters learn on the quantized base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.prune.precision import frozen_in_bfloat16, use_bfloat16
from graphprune.prune.training import Logits, Objective, Progress, Row, logits_of, train
from graphprune.recipe import Recover
from graphprune.source.text import Windows
from quant.embedding import QuantEmbedding
from quant.packed import cache_dequantized


def recover(
    model: nn.Module,
    teacher: nn.Module | None,
    settings: Recover,
    windows: Windows,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[Row]:
    """Train a quantized model's adapters on text and on the dense model's predictions.

    Args:
        model: With packed linear layers; its trainable parameters (the adapters) change in place.
        teacher: The dense model; None to learn from the text alone.
        settings: The recipe's section.
        windows: Training text.
        seed: Of the order of batches.
        progress: Told after each step.

    Returns:
        One row of metrics a step.

    Raises:
        TrainingError: If nothing is trainable, or the loss is not finite.
    """
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not adapters:
        raise TrainingError("the quantized model has no adapters to train", "raise quantize.rank")
    training = settings.training
    autocast = use_bfloat16(training, model)
    wanted = None if teacher is None else _without_gradients(teacher)
    with _dequantized(model, teacher, autocast):
        return train(
            windows.batches(training.batch_size, seed),
            Objective(logits_of(model), wanted, training.distill, autocast),
            torch.optim.AdamW(adapters, lr=training.learning_rate, weight_decay=0.0),
            steps=settings.steps,
            warmup=max(1, settings.steps // 20),
            trainable=adapters,
            progress=progress,
        )


@contextmanager
def _dequantized(model: nn.Module, teacher: nn.Module | None, autocast: bool) -> Iterator[None]:
    """Dequantize the base once for the whole training, in the type that is computed in."""
    if not autocast:
        with cache_dequantized(model, torch.float32):
            yield
        return
    embeddings = [module for module in model.modules() if isinstance(module, QuantEmbedding)]
    with cache_dequantized(model, torch.bfloat16), frozen_in_bfloat16(model, *([teacher] if teacher else [])):
        try:
            for embedding in embeddings:
                embedding.to(torch.bfloat16)
            yield
        finally:
            for embedding in embeddings:
                embedding.to(torch.float32)


def _without_gradients(teacher: nn.Module) -> Logits:
    logits = logits_of(teacher)

    def predict(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return logits(ids)

    return predict
