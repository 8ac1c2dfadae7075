"""Tiny models that are functions of their inputs alone, each with examples of these."""

from __future__ import annotations

from typing import Any

import torch
from exported_models import VOCABULARY, randomize, tiny_gpt2, tiny_llama
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

Inputs = dict[str, Any]


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _bert() -> BertConfig:
    return BertConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        num_labels=3,
    )


def _text() -> Inputs:
    """A batch of which one text is padded and the other has two parts."""
    mask, parts = torch.ones(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    mask[0, 7:], parts[1, 5:] = 0, 1
    return {"input_ids": tokens(2, 11), "attention_mask": mask, "token_type_ids": parts}


def bert_classifier() -> tuple[nn.Module, Inputs]:
    return randomize(BertForSequenceClassification(_bert()), seed=1), _text()


def bert_with_all_states() -> tuple[nn.Module, Inputs]:
    """Its last hidden state is the last of all hidden states: one value under two names."""
    return randomize(BertModel(_bert()), seed=2), {**_text(), "output_hidden_states": True}


def vision_transformer() -> tuple[nn.Module, Inputs]:
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return randomize(ViTForImageClassification(config), seed=3), {"pixel_values": drawn(1, 3, 32, 32)}


def decoder_without_cache() -> tuple[nn.Module, Inputs]:
    return tiny_gpt2(), {"input_ids": tokens(2, 9)}


def rotary_decoder_without_cache() -> tuple[nn.Module, Inputs]:
    """Its positions are counted once for all texts of a batch."""
    return tiny_llama(), {"input_ids": tokens(2, 9)}


def encoder_decoder() -> tuple[nn.Module, Inputs]:
    config = T5Config(
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    model = randomize(T5ForConditionalGeneration(config), seed=5)
    ids = tokens(2, 11)
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": tokens(2, 7, seed=1),
    }


def perceptron() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 32))
    return randomize(model, seed=6), {"input": drawn(3, 32)}


def torch_encoder() -> tuple[nn.Module, Inputs]:
    """Torch's own layers, which in evaluation otherwise are one operator of its own."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return randomize(model, seed=7), {"src": drawn(2, 6, 32)}


class Residual(nn.Module):
    """Two convolutions with a shortcut; it returns the class scores and the picture of features twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(32), nn.BatchNorm2d(32)])
        self.classes = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = self.norms[0](self.first(x)).relu()
        features = (first + self.norms[1](self.second(first))).relu()
        return self.classes(features.mean((2, 3))), features, features


def residual_network() -> tuple[nn.Module, Inputs]:
    model = randomize(Residual(), seed=8)
    for norm in model.norms:
        norm.running_mean.copy_(drawn(32) * 0.1)
        norm.running_var.copy_(drawn(32).abs() + 0.5)
    return model, {"x": drawn(2, 3, 8, 8)}


class SharedTable(nn.Module):
    """A table that is looked up and, as a parameter, multiplied by; an input of a parameter's and an output's name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.table(ids) * self.scale + scale
        return {"scores": functional.linear(hidden, self.table.weight), "ids": ids}


def shared_table() -> tuple[nn.Module, Inputs]:
    return randomize(SharedTable(), seed=9), {"ids": tokens(2, 5), "scale": drawn(2, 5, 32)}


FUNCTIONS = {
    build.__name__: build
    for build in (
        bert_classifier,
        bert_with_all_states,
        vision_transformer,
        decoder_without_cache,
        rotary_decoder_without_cache,
        encoder_decoder,
        perceptron,
        torch_encoder,
        residual_network,
        shared_table,
    )
}
