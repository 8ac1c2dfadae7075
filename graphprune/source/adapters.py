"""LoRA adapters on every linear layer of a model's blocks, by PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphprune.errors import SourceError


def attach_adapters(model: nn.Module, rank: int, alpha: int) -> Any:
    """Wrap a model so that every linear layer (Conv1D too) but the output head has a fresh LoRA adapter.

    Args:
        model: A transformers model; PEFT changes it in place.
        rank: Of the adapters.
        alpha: Numerator of their scale alpha / rank.

    Returns:
        The PEFT model, in evaluation mode; only adapters are trainable.
    """
    from peft import LoraConfig, get_peft_model

    names = _linear_names(model)
    if not names:
        raise SourceError(
            f"{type(model).__name__} has no linear layer to attach adapters to", "choose another model"
        )
    # By name: PEFT's own "all-linear" also wraps a mixture's routers and experts, in a way that nothing can trace.
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    return get_peft_model(model, config).eval()


def _linear_names(model: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def plain_paths(model: Any) -> dict[str, str]:
    """Return, for each layer in a wrapped model that has an adapter, its path there and in the model without."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    bare = {id(module): name for name, module in model.get_base_model().named_modules()}
    return {
        f"{path}.base_layer": bare[id(module)]
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and id(module) in bare
    }
