"""Packed layers on disk: bit for bit, shared tensors once, and nothing damaged is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quant_apply import TOKENS, LanguageModel
from torch import nn

from quant import (
    LoftQConfig,
    QuantEmbedding,
    QuantError,
    QuantLinear,
    load_quantized_,
    loftq_model,
    loftq_parameter_,
    pack_parameter_,
    quantize,
    save_quantized,
)
from quant.ternary import PackedExperts, TernaryConfig, quantize_experts, replace_parameter_


def quantized_model(**settings: object) -> LanguageModel:
    model = LanguageModel()
    loftq_model(model, LoftQConfig(**{"rank": 4, "block_size": 16, "embedding_format": "int8", **settings}))
    return model


def rewrite_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put other tensors into the file, with a hash that fits."""
    save_file(tensors, folder / "quant.safetensors")
    index = json.loads((folder / "quant.json").read_text())
    index["sha256"] = hashlib.sha256((folder / "quant.safetensors").read_bytes()).hexdigest()
    (folder / "quant.json").write_text(json.dumps(index))


@pytest.mark.parametrize("format", ["nf4", "nf3", "int2", "int8"])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, format: str) -> None:
    model = quantized_model(format=format)
    save_quantized(model, tmp_path)
    other = LanguageModel()
    load_quantized_(other, tmp_path)
    state, back = model.state_dict(), other.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[key], back[key]) and state[key].dtype == back[key].dtype for key in state)
    assert torch.equal(model(TOKENS), other(TOKENS))


@pytest.mark.parametrize(("format", "share"), [("nf4", 0.30), ("uint2", 0.20)])
def test_files_hold_little_but_codes_scales_and_adapters(tmp_path: Path, format: str, share: float) -> None:
    """Within 2 % of their sum, and of float16's bytes the shares that LoftQ's paper gives, at a 7B model's rank."""
    model = nn.Sequential(nn.Linear(2048, 1024, bias=False), nn.Linear(1024, 1024, bias=False))
    weights = sum(layer.weight.numel() for layer in model)
    loftq_model(model, LoftQConfig(format=format, rank=8, iterations=0, scale_storage="double"))
    save_quantized(model, tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    parts = sum(layer.quantized.nbytes + layer.lora_A.nbytes + layer.lora_B.nbytes for layer in model)
    assert size <= 1.02 * parts
    assert size <= share * 2 * weights


def test_what_is_shared_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    model = quantized_model()
    save_quantized(model, tmp_path)
    keys = load_file(tmp_path / "quant.safetensors").keys()
    assert "embedding.codes" in keys
    assert not any(key.startswith("head.") for key in keys)
    index = json.loads((tmp_path / "quant.json").read_text())
    assert index["schema"] == "graphprune.quant/1"
    assert index["layers"]["head"]["tied_to"] == "embedding"
    assert index["layers"]["blocks.0.up"] == {
        "kind": "linear", "format": "nf4", "block_size": 16, "shape": [64, 32], "rank": 4, "scaling": 1.0,
    }  # fmt: skip
    other = LanguageModel()
    load_quantized_(other, tmp_path)
    assert isinstance(other.embedding, QuantEmbedding)
    assert isinstance(other.head, QuantLinear)
    assert other.head.codes is other.embedding.codes
    assert other.head.absmax is other.embedding.absmax


def test_shared_adapters_are_shared_again(tmp_path: Path) -> None:
    model = LanguageModel()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    loftq_model(model, LoftQConfig(rank=4))
    save_quantized(model, tmp_path)
    other = LanguageModel()
    load_quantized_(other, tmp_path)
    assert other.blocks[0].up.lora_A is other.blocks[1].up.lora_A
    assert not torch.equal(other.blocks[0].up.bias, other.blocks[1].up.bias)


def test_scaling_and_trained_factors_come_back_as_they_were(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 24))
    loftq_model(model, LoftQConfig(rank=4))
    old = model[0]
    model[0] = QuantLinear.from_parts(old.quantized, old.bias, old.lora_A, old.lora_B, scaling=2.0)
    save_quantized(model, tmp_path)
    other = nn.Sequential(nn.Linear(32, 24))
    load_quantized_(other, tmp_path)
    assert other[0].scaling == 2.0
    assert torch.equal(other[0].lora_A, model[0].lora_A)
    assert other[0].lora_A.requires_grad


def test_a_model_on_the_meta_device_takes_the_layers(tmp_path: Path) -> None:
    model = quantized_model()
    save_quantized(model, tmp_path)
    with torch.device("meta"):
        empty = LanguageModel()
    load_quantized_(empty, tmp_path)
    assert torch.equal(empty(TOKENS), model(TOKENS))


def test_a_packed_model_takes_other_layers(tmp_path: Path) -> None:
    save_quantized(quantized_model(format="nf2"), tmp_path)
    model = quantized_model(format="nf4")
    load_quantized_(model, tmp_path)
    assert model.blocks[0].up.format == "nf2"


def test_saving_twice_writes_the_same_bytes_and_no_temporary_file(tmp_path: Path) -> None:
    model = quantized_model()
    save_quantized(model, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_quantized(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert sorted(first) == ["quant.json", "quant.safetensors"]


def test_a_changed_byte_is_found_and_the_model_left_as_it_was(tmp_path: Path) -> None:
    save_quantized(quantized_model(), tmp_path)
    file = tmp_path / "quant.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    model = LanguageModel()
    with pytest.raises(QuantError, match="not the file that"):
        load_quantized_(model, tmp_path)
    assert type(model.head) is nn.Linear


def test_a_model_of_other_shapes_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    save_quantized(quantized_model(), tmp_path)
    model = LanguageModel(width=16)
    with pytest.raises(QuantError, match=r"blocks\.0\.down is a Linear of shape \(16, 32\)"):
        load_quantized_(model, tmp_path)
    assert type(model.blocks[0].down) is nn.Linear
    with pytest.raises(QuantError, match="nothing in the model"):
        load_quantized_(nn.Sequential(nn.Linear(2, 2)), tmp_path)


@pytest.mark.parametrize("key", ["blocks.0.up.codes", "blocks.0.up.lora_A", "embedding.absmax"])
def test_a_missing_tensor_is_refused(tmp_path: Path, key: str) -> None:
    save_quantized(quantized_model(), tmp_path)
    tensors = load_file(tmp_path / "quant.safetensors")
    del tensors[key]
    rewrite_tensors(tmp_path, tensors)
    with pytest.raises(QuantError):
        load_quantized_(LanguageModel(), tmp_path)


def test_a_tensor_of_no_layer_is_refused(tmp_path: Path) -> None:
    save_quantized(quantized_model(), tmp_path)
    rewrite_tensors(tmp_path, {**load_file(tmp_path / "quant.safetensors"), "stranger.codes": torch.zeros(1)})
    with pytest.raises(QuantError, match=r"stranger\.codes of no layer"):
        load_quantized_(LanguageModel(), tmp_path)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema": "graphprune.quant/1"}', "damaged"),
        ('{"schema": "graphprune.quant/2", "sha256": "", "layers": {}}', "quant/2"),
        ('{"schema": "graphprune.quant/1", "sha256": "", "layers": {"head": {"kind": "linear"}}}', "damaged"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: str, match: str) -> None:
    save_quantized(quantized_model(), tmp_path)
    (tmp_path / "quant.json").write_text(damage)
    with pytest.raises(QuantError, match=match):
        load_quantized_(LanguageModel(), tmp_path)


def test_a_damaged_tensor_file_is_refused(tmp_path: Path) -> None:
    save_quantized(quantized_model(), tmp_path)
    (tmp_path / "quant.safetensors").write_bytes(b"nothing")
    index = json.loads((tmp_path / "quant.json").read_text())
    index["sha256"] = hashlib.sha256(b"nothing").hexdigest()
    (tmp_path / "quant.json").write_text(json.dumps(index))
    with pytest.raises(QuantError, match="damaged"):
        load_quantized_(LanguageModel(), tmp_path)


def test_an_empty_folder_and_a_float_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=r"holds no quant\.safetensors"):
        load_quantized_(LanguageModel(), tmp_path)
    with pytest.raises(QuantError, match="no packed layer"):
        save_quantized(LanguageModel(), tmp_path)


def test_a_packed_model_without_data_is_not_written_over_one_with(tmp_path: Path) -> None:
    model, _ = loftq_model(LanguageModel(), LoftQConfig(rank=2))
    save_quantized(model, tmp_path)
    before = (tmp_path / "quant.safetensors").read_bytes()
    with pytest.raises(QuantError, match="on the meta device and has no data"):
        save_quantized(model.to("meta"), tmp_path)
    assert (tmp_path / "quant.safetensors").read_bytes() == before


class Mixture(nn.Module):
    """Weights that no layer holds: a matrix stored (in, out), shared by name, and two stacks of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward = nn.Linear(32, 32)
        self.mixing = nn.Parameter(torch.randn(32, 48))
        self.up = nn.Parameter(torch.randn(3, 16, 48))
        self.down = nn.Parameter(torch.randn(3, 32, 16))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        mixed = self.inward(rows) @ self.mixing
        return sum(mixed @ self.up[expert].T @ self.down[expert].T for expert in range(3))


def packed_mixture() -> Mixture:
    model = Mixture()
    loftq_model(model, LoftQConfig(rank=2, block_size=16, iterations=1))
    loftq_parameter_(model, "mixing", "uint2", 2, 1, 16, transposed=True, scale_storage="double")
    loftq_parameter_(model, "up", "nf4", 2, 1, 16)
    experts = quantize_experts(model.down.detach())
    replace_parameter_(model, "down", PackedExperts(experts.quantized))
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_packed_parameters_and_experts_come_back_bit_for_bit(tmp_path: Path, device: str) -> None:
    model = packed_mixture()
    model.parametrizations["up"][0].scaling = 0.5
    save_quantized(model, tmp_path)
    other = Mixture().to(device)
    load_quantized_(other, tmp_path)
    state, back = model.state_dict(), other.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[key], back[key]) and state[key].dtype == back[key].dtype for key in state)
    rows = torch.randn(4, 32)
    assert torch.equal(model(rows), other(rows))
    assert other.parametrizations["up"][0].lora_A.requires_grad


def test_two_bit_experts_and_parameters_without_adapters_come_back(tmp_path: Path) -> None:
    model = Mixture()
    plain = quantize_experts(model.up.detach(), config=TernaryConfig(most_bits=0.1, block_size=16))
    replace_parameter_(model, "up", PackedExperts(plain.quantized))
    pack_parameter_(model, "down", quantize(model.down, "int3", 16))
    save_quantized(model, tmp_path)
    other = Mixture()
    load_quantized_(other, tmp_path)
    rows = torch.randn(4, 32)
    assert torch.equal(model(rows), other(rows))


def test_a_parameter_of_another_shape_is_refused_and_the_model_left_as_it_was(tmp_path: Path) -> None:
    save_quantized(packed_mixture(), tmp_path)
    other = Mixture()
    other.mixing = nn.Parameter(torch.zeros(48, 32))
    with pytest.raises(QuantError, match=r"mixing is of shape \(48, 32\) in the model.*parameter \(32, 48\)"):
        load_quantized_(other, tmp_path)
    assert isinstance(other.inward, nn.Linear)
    with pytest.raises(QuantError, match="packed already"):
        load_quantized_(packed_mixture(), tmp_path)
