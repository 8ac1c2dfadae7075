"""The tiny models that this folder exports, and texts for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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


def tiny_falcon() -> nn.Module:
    """Multi-query attention: one head of keys and values for all queries."""
    config = FalconConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        new_decoder_architecture=False,
        parallel_attn=True,
        alibi=False,
        ffn_hidden_size=96,
        vocab_size=99,
        max_position_embeddings=64,
    )
    return randomize(FalconForCausalLM(config), seed=6)


def tiny_gpt_neox() -> nn.Module:
    """LayerNorm, biases, one matrix for query, key and value, rotary positions on half a head, parallel branches."""
    config = GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        rotary_pct=0.5,
    )
    return randomize(GPTNeoXForCausalLM(config), seed=4)


def tiny_uneven_qwen2() -> nn.Module:
    """Biases in query, key and value, and layers of different head counts and widths."""
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    model = randomize(Qwen2ForCausalLM(config), seed=3)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for layer, rows in ((attention.q_proj, 32), (attention.k_proj, 16), (attention.v_proj, 16)):
        layer.weight = nn.Parameter(layer.weight[:rows].detach().clone())
        layer.bias = nn.Parameter(layer.bias[:rows].detach().clone())
        layer.out_features = rows
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :32].detach().clone())
    attention.o_proj.in_features = 32
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight = nn.Parameter(layer.weight[:100].detach().clone())
        layer.out_features = 100
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :100].detach().clone())
    mlp.down_proj.in_features = 100
    return model


def windows(*lengths: int) -> list[list[int]]:
    """Return random texts of these lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
