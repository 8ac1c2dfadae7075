"""Tiny models, exported once for all tests of this folder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import quant
from graphprune.export.write import export_onnx

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


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = tiny_llama()
    return Exported(model, export_onnx(model, tmp_path_factory.mktemp("dense") / "onnx"))


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """NF4 with adapters that matter and a scaling that is not 1, and an 8-bit tied embedding."""
    model = tiny_llama()
    config = quant.LoftQConfig(
        format="nf4", block_size=64, rank=RANK, iterations=1, embedding_format="int8", embedding_block_size=32
    )
    quant.loftq_model(model, config)
    randomize(model, seed=5)
    for module in model.modules():
        if isinstance(module, quant.QuantLinear):
            module.scaling = 1.5
    folder = tmp_path_factory.mktemp("packed") / "onnx"
    return Exported(model, export_onnx(model, folder, metadata={"graphprune": "a test"}))


@pytest.fixture(scope="session")
def learned_positions(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model that minds the positions themselves and not their differences alone."""
    model = tiny_gpt2()
    return Exported(model, export_onnx(model, tmp_path_factory.mktemp("positions") / "onnx"))


@pytest.fixture
def packed_model(packed: Exported) -> nn.Module:
    """A copy of the packed model that a test may change."""
    return copy.deepcopy(packed.model)
