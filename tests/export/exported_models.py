"""The tiny models that this folder exports, and texts for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 99
LAYERS = 2
RANK = 4


@dataclass(frozen=True)
class Exported:
    """A model and the file that was written from it."""

    model: nn.Module
    path: Path


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter with numbers from a seeded generator, none of them special (no ones, no zeros)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tiny_llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return randomize(LlamaForCausalLM(config), seed=1)


def tiny_gpt2() -> nn.Module:
    """LayerNorm, biases, learned positions, one matrix for query, key and value that is not an nn.Linear."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=64)
    return randomize(GPT2LMHeadModel(config), seed=2)


def windows(*lengths: int) -> list[list[int]]:
    """Return random texts of these lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
