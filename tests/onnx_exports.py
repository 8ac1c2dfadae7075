"""What torch's exporter makes of tiny models: decoders, an encoder, a convolutional net."""

from __future__ import annotations

import onnx_ir as ir
import torch
from tiny_models import randomized
from torch import nn


class Positioned(nn.Module):
    """A Llama whose rotary angles are read by several layers; the exporter folds them where positions are no input."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=61,
            max_position_embeddings=32,
        )
        self.model = randomized(LlamaForCausalLM(config))

    def forward(self, input_ids, position_ids):
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4}
    return randomized(BertModel(BertConfig(vocab_size=61, max_position_embeddings=32, **sizes)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.second(self.first(x).relu())).relu().mean((2, 3)))


def exported(model: nn.Module, inputs: dict[str, torch.Tensor], opset: int) -> ir.Model:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {name: {0: batch, 1: length} if item.dim() == 2 else {0: batch} for name, item in inputs.items()}
    with torch.no_grad():
        program = torch.onnx.export(
            model, kwargs=inputs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
        )
    return program.model


IDS = torch.arange(22).reshape(2, 11) + 3
EXPORTS = {
    "llama 18": (
        lambda: Positioned(1),
        18,
        {"input_ids": IDS, "position_ids": torch.arange(11).repeat(2, 1)},
    ),
    "llama 23": (
        lambda: Positioned(2),
        23,
        {"input_ids": IDS, "position_ids": torch.arange(11).repeat(2, 1)},
    ),
    "bert 18": (bert, 18, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
    "bert 23": (bert, 23, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
    "residual 18": (lambda: randomized(Residual()), 18, {"x": torch.randn(2, 3, 8, 8)}),
}
