"""Tiny models, built in code, that every room is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.source.model import example_inputs
from graphprune.trace.model import trace

HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY, LAYERS = 32, 48, 4, 2, 67, 2


@dataclass(frozen=True)
class Traced:
    """A model with what the engine says of it."""

    model: Any
    groups: NodeGroups
    inputs: dict[str, Any]

    def of_kind(self, kind: str) -> list[str]:
        return [name for name, group in self.groups.items() if group.kind == kind]


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama of two layers with grouped-query attention and a tied head; norms are not all ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=changes.pop("num_hidden_layers", LAYERS),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    return randomized(model, seed)


def randomized(model: nn.Module, seed: int = 0) -> Any:
    """Give every parameter random values of a sensible size, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.eval()


def traced(model: Any) -> Traced:
    inputs = example_inputs(model)
    return Traced(model, node_groups(trace(model, inputs)), inputs)
