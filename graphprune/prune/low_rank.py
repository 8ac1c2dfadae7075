"""LoRA's factors beside the weights that they update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError

ROWS = 1024
"""Rows of an update that are computed at a time: BA is never whole in memory."""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """s BA, which a layer adds to its weight W.

    Attributes:
        layer: The layer's qualified name.
        weight: W, (outputs, inputs), or (inputs, outputs) if transposed.
        transposed: Whether outputs are W's second axis.
        a: A, (rank, inputs).
        b: B, (outputs, rank).
        scale: s.
    """

    layer: str
    weight: nn.Parameter
    transposed: bool
    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def merge(self) -> None:
        """Add s BA to W, and set B to zero: the layer computes what it did."""
        weight = self.weight.data.T if self.transposed else self.weight.data
        for rows, b in zip(weight.split(ROWS), self.b.data.split(ROWS), strict=True):
            wide = working_dtype(weight)
            rows.copy_(rows.to(wide).addmm(b.to(wide), self.a.data.to(wide), alpha=self.scale))
        self.b.data.zero_()


def working_dtype(weight: Tensor) -> torch.dtype:
    """Return the type to compute in on a weight: its own, at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def low_rank_updates(model: nn.Module) -> list[LowRankUpdate]:
    """Return the updates of all LoRA layers of a PEFT model.

    Raises:
        TrainingError: If an adapter is anything but LoRA as published on a linear layer of floating-point weights.
    """
    return list(_found(model))


def _found(model: nn.Module) -> Iterator[LowRankUpdate]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                reason = _unsuited(module, adapter)
                if reason:
                    raise TrainingError(
                        f"LHSPG's paper mode cannot work on the adapter of {name}: {reason}",
                        "use mode='gated', which works on any",
                    )
                yield LowRankUpdate(
                    name,
                    module.get_base_layer().weight,
                    bool(getattr(module, "fan_in_fan_out", False)),
                    module.lora_A[adapter].weight,
                    module.lora_B[adapter].weight,
                    float(module.scaling[adapter]),
                )


def _unsuited(module: Any, adapter: str) -> str | None:
    """Return why W + s BA is not what a layer computes with, or None."""
    if len(module.active_adapters) > 1:
        return "several adapters are active"
    if module.merged_adapters:
        return "it is merged already"
    if adapter not in module.lora_A or adapter in module.lora_variant or module.lora_bias.get(adapter):
        return "it is not a plain pair of factors"
    weight = getattr(module.get_base_layer(), "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return "its weight is quantized"
    b, a = module.lora_B[adapter].weight, module.lora_A[adapter].weight
    updated = (b.shape[0], a.shape[-1])
    expected = tuple(weight.shape)[::-1] if getattr(module, "fan_in_fan_out", False) else tuple(weight.shape)
    return None if updated == expected else f"its weight is of shape {tuple(weight.shape)}"
