"""Adapters in a file of their own: what they change, and for which model they are."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from exported_models import Exported, randomize, tiny_llama, windows
from torch import nn

import quant
from graphprune.errors import ExportError
from graphprune.export.adapter_file import open_adapter, write_adapter
from graphprune.export.write import export_onnx


def logits(path: Path, ids: list[list[int]], adapter: Path | None = None) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokens = np.array(ids)
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feeds["position_ids"] = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), dtype=np.float32)
    options = onnxruntime.RunOptions()
    if adapter is not None:
        opened = open_adapter(adapter, path)  # a session keeps no reference of its own
        options.add_active_adapter(opened)
    return session.run(["logits"], feeds, options)[0]


@pytest.fixture
def retrained(packed_model: nn.Module) -> nn.Module:
    """The packed model with other adapters, of another rank in one layer."""
    generator = torch.Generator().manual_seed(11)
    for layer in packed_model.modules():
        if isinstance(layer, quant.QuantLinear) and layer.lora_A is not None:
            layer.lora_A = nn.Parameter(torch.randn(layer.lora_A.shape, generator=generator) * 0.2)
    first = packed_model.model.layers[0].mlp.up_proj
    first.lora_A = nn.Parameter(torch.randn(2, first.in_features, generator=generator) * 0.2)
    first.lora_B = nn.Parameter(torch.randn(first.out_features, 2, generator=generator) * 0.2)
    return packed_model


def test_a_model_with_another_adapter_is_the_model_that_the_adapter_is_of(
    packed: Exported, retrained: nn.Module, tmp_path: Path
) -> None:
    adapter = write_adapter(retrained, tmp_path / "new.onnx_adapter")
    ids = windows(9, 9)
    whole = export_onnx(retrained, tmp_path / "onnx")
    expected, before = logits(whole, ids), logits(packed.path, ids)
    assert np.abs(expected - before).max() > 0.5
    np.testing.assert_array_equal(logits(packed.path, ids, adapter), expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_adapter_of_other_packed_weights_is_refused(
    packed: Exported, packed_model: nn.Module, tmp_path: Path
) -> None:
    with torch.no_grad():
        packed_model.model.layers[1].mlp.down_proj.quantized.codes[5] ^= 1
    adapter = write_adapter(packed_model, tmp_path / "other.onnx_adapter")
    with pytest.raises(ExportError, match="made for other packed weights"):
        open_adapter(adapter, packed.path)


def test_what_is_no_adapter_is_refused(packed: Exported, dense: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no adapter"):
        open_adapter(tmp_path / "none.onnx_adapter", packed.path)
    (tmp_path / "text.onnx_adapter").write_text("no adapter")
    with pytest.raises(ExportError, match="is no adapter"):
        open_adapter(tmp_path / "text.onnx_adapter", packed.path)
    adapter = write_adapter(packed.model, tmp_path / "right.onnx_adapter")
    with pytest.raises(ExportError, match="made for other packed weights"):
        open_adapter(adapter, dense.path)
    with pytest.raises(ExportError, match="no adapters"):
        write_adapter(dense.model, tmp_path / "dense.onnx_adapter")


def test_a_model_whose_layers_have_no_adapters_takes_none(packed: Exported, tmp_path: Path) -> None:
    bare = copy.deepcopy(packed.model)
    for layer in bare.modules():
        if isinstance(layer, quant.QuantLinear):
            layer.lora_A = layer.lora_B = None
    path = export_onnx(bare, tmp_path / "onnx")
    adapter = write_adapter(packed.model, tmp_path / "a.onnx_adapter")
    with pytest.raises(ExportError, match=r"does not take .*lora_A.weight from outside"):
        open_adapter(adapter, path)


def test_the_digest_minds_the_packed_weights_alone() -> None:
    from graphprune.export.adapter_file import base_digest

    model = tiny_llama()
    quant.loftq_model(model, quant.LoftQConfig(rank=2, iterations=1))
    before = base_digest(model)
    for layer in model.modules():
        if isinstance(layer, quant.QuantLinear):
            randomize(nn.ParameterList([layer.lora_A, layer.lora_B]), seed=3)
    assert base_digest(model) == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.quantized.scales.stored[1] *= 2
    assert base_digest(model) != before
