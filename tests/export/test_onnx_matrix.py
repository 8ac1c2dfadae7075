"""Architectures, profiles and every format at once: each file is verified against torch."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from exported_models import randomize, tiny_falcon, tiny_gpt_neox, tiny_llama, tiny_uneven_qwen2, windows
from test_onnx_export import load
from torch import nn

import quant
from graphprune.errors import ExportError
from graphprune.export.file_weights import file_weights
from graphprune.export.layouts import PROFILES, Profile
from graphprune.export.modules import Adapters
from graphprune.export.verify import WEIGHT_TOLERANCE, verify_onnx
from graphprune.export.write import export_onnx

ARCHITECTURES = {"llama": tiny_llama, "gpt2": tiny_gpt_neox, "uneven qwen2": tiny_uneven_qwen2}
STORAGES = ("float32", "float16", "double")


def quantized_by_turns(model: nn.Module, first: int) -> nn.Module:
    """Quantize each matrix in another format, a tied embedding in 8 bits, with adapters beside them."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    formats = itertools.islice(itertools.cycle(quant.format_names()), first, None)
    config = quant.LoftQConfig(
        formats=tuple((rf"{name}$", format) for name, format in zip(names, formats, strict=False)),
        block_size=32,
        rank=2,
        iterations=1,
        scale_storage=STORAGES[first % 3],
        embedding_format="uint8",
    )
    quant.loftq_model(model, config)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("profile", "exact"), [("cpu", False), ("cpu", True), ("cuda", False), ("portable", False)]
)
def test_every_format_on_every_profile(
    architecture: str, profile: Profile, exact: bool, tmp_path: Path
) -> None:
    """Prefill, a padded batch and decoding to float rounding, weights to the bit or with the documented rounding."""
    model = quantized_by_turns(
        ARCHITECTURES[architecture](), first=sorted(PROFILES).index(profile) + 3 * exact
    )
    path = export_onnx(model, tmp_path / "onnx", profile=profile, exact=exact)
    found = verify_onnx(path, model, windows(20, 12))
    assert found.max_relative_error < 2e-5
    assert found.checks["weight_rounding"] < (WEIGHT_TOLERANCE if exact else 0.0036)
    domains = {node.domain for node in load(path).graph.node}
    assert domains == ({""} if profile == "portable" else {"", "com.microsoft"})
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, quant.QuantLinear)}
    assert {name for name, _ in file_weights(path)} & quantized  # else nothing of the above was compared


def test_a_profile_that_does_not_exist_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no export profile .gpu.\n.*cpu, cuda, portable"):
        export_onnx(nn.Linear(2, 2), tmp_path / "onnx", profile="gpu")


@pytest.mark.parametrize("adapters", ["constant", "merged"])
def test_adapters_that_nobody_can_override(adapters: Adapters, tmp_path: Path) -> None:
    """Constants beside packed weights, one of which has none; or added to dense weights."""
    model = tiny_uneven_qwen2()
    quant.loftq_model(model, quant.LoftQConfig(format="uint4", block_size=32, rank=3, iterations=1))
    model = randomize(model, seed=6)
    for layer in model.modules():
        if isinstance(layer, quant.QuantLinear):
            layer.scaling = 1.5
    key = model.model.layers[0].self_attn.k_proj
    key.lora_A = key.lora_B = None
    path = export_onnx(model, tmp_path / "onnx", adapters=adapters)
    found = verify_onnx(path, model, windows(20, 12))
    assert found.max_relative_error < 2e-5
    graph = load(path).graph
    assert not {value.name for value in graph.input} & {tensor.name for tensor in graph.initializer}
    names = {tensor.name for tensor in graph.initializer}
    assert ("model.layers.0.mlp.up_proj.weight" in names) == (adapters == "merged")
    assert ("model.layers.0.mlp.up_proj.lora_A.weight" in names) == (adapters == "constant")
    if adapters == "merged":
        assert found.kl < 1e-8


def test_another_word_for_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="written as 'frozen'"):
        export_onnx(nn.Linear(2, 2), tmp_path / "onnx", adapters="frozen")


def test_a_key_head_that_is_broadcast_to_all_queries_is_exported_as_a_group(tmp_path: Path) -> None:
    """Falcon's multi-query attention leaves the broadcast to torch's operator, and ONNX's has none."""
    model = tiny_falcon()
    path = export_onnx(model, tmp_path / "onnx")
    assert verify_onnx(path, model, windows(20, 12)).max_relative_error < 1e-5
    cached = {value.name: value for value in load(path).graph.input if "past" in value.name}
    assert cached["past_key_values.0.key"].type.tensor_type.shape.dim[1].dim_value == 1
