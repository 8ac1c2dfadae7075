"""Embeddings that multiply their rows by a constant: it is in the file, and their table there once, unscaled."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported_models import VOCABULARY, randomize, windows
from test_onnx_export import load
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import quant
from graphprune.export.layouts import Profile
from graphprune.export.verify import verify_onnx
from graphprune.export.verify_outputs import verify_outputs
from graphprune.export.write import export_onnx

WIDTH = 96
SCALE = math.sqrt(WIDTH)


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * SCALE


class Shifted(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * SCALE + 1


class Tagger(nn.Module):
    """A layer between an embedding and a head that is tied to it."""

    def __init__(self, kind: type[nn.Embedding] = Scaled) -> None:
        super().__init__()
        self.table = kind(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        randomize(self, seed=3)
        self.head.weight = self.table.weight
        self.eval()

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.table(ids)
        return {"rows": rows, "scores": self.head(torch.tanh(self.layer(rows)))}


IDS = {"ids": torch.arange(2, 14).view(2, 6)}


def tiny_gemma() -> nn.Module:
    """A tied head, norms of queries and keys, a layer that sees 8 tokens."""
    config = Gemma3TextConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention"],
        sliding_window=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    return randomize(Gemma3ForCausalLM(config), seed=5)


def tables(path: Path) -> dict[str, onnx.TensorProto]:
    """Return what is as large as the table in 4 bits or more, and is no layer's between embedding and head."""
    found = {tensor.name: tensor for tensor in load(path).graph.initializer if "layer" not in tensor.name}
    return {name: t for name, t in found.items() if np.prod(t.dims) >= VOCABULARY * WIDTH // 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_table_is_stored_once_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Tagger().to(dtype)
    path = export_onnx(model, tmp_path / "onnx", examples=IDS)
    found = {check.name: check.measured for check in verify_outputs(path, model, IDS)}
    assert max(found.values()) < 1e-5
    assert [*tables(path)] == ["table.weight"]
    stored = onnx.TensorProto.FLOAT if dtype == torch.float32 else onnx.TensorProto.BFLOAT16
    assert tables(path)["table.weight"].data_type == stored


@pytest.mark.parametrize(
    ("format", "profile"),
    [("int8", "cpu"), ("uint4", "cuda"), ("nf4", "cpu"), ("int8", "portable"), ("uint4", "portable")],
)
def test_a_packed_table_is_shared_with_the_head(format: str, profile: Profile, tmp_path: Path) -> None:
    model = Tagger()
    config = quant.LoftQConfig(rank=2, block_size=32, iterations=1, embedding_format=format)
    quant.loftq_model(model, config)
    path = export_onnx(model, tmp_path / "onnx", examples=IDS, profile=profile, exact=True)
    found = {check.name: check.measured for check in verify_outputs(path, model, IDS)}
    assert found.pop("shipped") < 0.03
    assert max(found.values()) < 2e-5
    assert [*tables(path)] == ["table.weight.codes"]
    operators = Counter(node.op_type for node in load(path).graph.node)
    assert operators["GatherBlockQuantized"] == (format != "nf4" and profile != "portable")


def test_an_embedding_that_computes_more_is_traced_as_it_is(tmp_path: Path) -> None:
    model = Tagger(Shifted)
    path = export_onnx(model, tmp_path / "onnx", examples=IDS)
    assert max(check.measured for check in verify_outputs(path, model, IDS)) < 1e-5


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_a_table_that_is_a_packed_parameter_is_traced_as_it_is(
    kind: type[nn.Embedding], tmp_path: Path
) -> None:
    model = Tagger(kind)
    quant.pack_parameter_(model, "table.weight", quant.quantize(model.table.weight.detach(), "uint4", 32))
    path = export_onnx(model, tmp_path / "onnx", examples=IDS, exact=True)
    found = {check.name: check.measured for check in verify_outputs(path, model, IDS)}
    assert found.pop("shipped") < 0.03
    assert max(found.values()) < 2e-5


def test_gemma_with_adapters(tmp_path: Path) -> None:
    """Texts longer than its window, a padded batch, token by token: all that a cached decoder is verified on."""
    model = tiny_gemma()
    config = quant.LoftQConfig(rank=2, block_size=32, iterations=1, embedding_format="int8")
    quant.loftq_model(model, config)
    randomize(nn.ParameterList(p for name, p in model.named_parameters() if "lora" in name), seed=4)
    path = export_onnx(model, tmp_path / "onnx")
    assert verify_onnx(path, model, windows(20, 12)).max_relative_error < 2e-5
    assert [*tables(path)] == ["model.embed_tokens.weight.codes"]
