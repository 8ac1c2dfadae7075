"""LoRA adapters on every linear layer of a model's blocks, by PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn


def attach_adapters(model: nn.Module, rank: int, alpha: int) -> Any:
    """Wrap a model so that every linear layer but the output head has a fresh LoRA adapter.

    Args:
        model: A transformers model; PEFT changes it in place.
        rank: Of the adapters.
        alpha: Numerator of their scale alpha / rank.

    Returns:
        The PEFT model, in evaluation mode; only adapters are trainable.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config).eval()
