"""Recovery: the adapters learn on the quantized base."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.prune.training import Logits, Objective, Progress, Row, logits_of, train, use_bfloat16
from graphprune.recipe import Recover
from graphprune.source.text import Windows


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
    wanted = None if teacher is None else _without_gradients(teacher)
    rows = train(
        windows.batches(training.batch_size, seed),
        Objective(logits_of(model), wanted, training.distill, use_bfloat16(training)),
        torch.optim.AdamW(adapters, lr=training.learning_rate, weight_decay=0.0),
        steps=settings.steps,
        warmup=max(1, settings.steps // 20),
        trainable=adapters,
        progress=progress,
    )
    model.eval()
    return rows


def _without_gradients(teacher: nn.Module) -> Logits:
    logits = logits_of(teacher)

    def predict(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return logits(ids)

    return predict
