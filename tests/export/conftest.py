"""Tiny models, exported once for all tests of this folder."""

from __future__ import annotations

import copy

import pytest
from exported_models import RANK, Exported, randomize, tiny_gpt2, tiny_llama
from torch import nn

import quant
from graphprune.export.write import export_onnx


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
