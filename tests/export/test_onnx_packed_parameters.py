"""Packed weights that no matrix module holds: GPT-2's (in, out) matrices and stacks of experts keep their bits."""

from __future__ import annotations

import copy
import itertools
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from exported_models import VOCABULARY, Exported, randomize, tiny_gpt2, windows
from function_models import drawn
from test_onnx_export import load
from test_onnx_verify import change_byte
from torch import nn
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

import quant
from graphprune.errors import ExportError, ExportWarning, VerificationError
from graphprune.export.adapter_file import base_digest, open_adapter, write_adapter
from graphprune.export.layouts import Profile
from graphprune.export.packed_weights import packed_weights
from graphprune.export.verify import WEIGHT_TOLERANCE, verify_onnx
from graphprune.export.verify_outputs import verify_outputs
from graphprune.export.write import export_onnx

EXPERTS = 4


def tiny_mixtral() -> nn.Module:
    """Stacks (experts, out, in), of which each token takes two; a router."""
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return randomize(MixtralForCausalLM(config), seed=3)


def packed_by_turns(model: nn.Module, formats: list[str]) -> nn.Module:
    """Pack what is not one of `nn.Linear`'s or `nn.Embedding`'s, with adapters that matter and a scaling."""
    turns = itertools.cycle(formats)
    held = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() > 1 and name not in held and not name.endswith("gate.weight"):
            quant.loftq_parameter_(model, name, next(turns), 2, 1, 32, transposed=parameter.dim() == 2)
    for module in model.modules():
        if isinstance(module, quant.PackedParameter):
            module.scaling = 1.5
            randomize(nn.ParameterList([module.lora_A, module.lora_B]), seed=4)
    return model.eval()


def silently(model: nn.Module, folder: Path, **options: object) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExportWarning)
        return export_onnx(model, folder, **options)


def stored(path: Path) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in load(path).graph.initializer}


@pytest.fixture(scope="module")
def conv1d(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = packed_by_turns(tiny_gpt2(), ["int4", "nf4", "uint3", "nf2"])
    return Exported(model, silently(model, tmp_path_factory.mktemp("conv1d") / "onnx"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = packed_by_turns(tiny_mixtral(), ["nf4", "uint4"])
    return Exported(model, silently(model, tmp_path_factory.mktemp("experts") / "onnx"))


@pytest.mark.parametrize("kind", ["conv1d", "experts"])
def test_the_file_is_torchs(kind: str, request: pytest.FixtureRequest) -> None:
    """With tokens that leave experts without work: a single one takes two of four."""
    exported: Exported = request.getfixturevalue(kind)
    found = verify_onnx(exported.path, exported.model, windows(20, 12))
    assert found.max_relative_error < 5e-6
    assert found.checks["weights"] < WEIGHT_TOLERANCE
    assert 1e-4 < found.checks["weight_rounding"] < 0.0036


@pytest.mark.parametrize("kind", ["conv1d", "experts"])
def test_each_matrix_is_one_product_of_its_packed_bytes(kind: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(kind)
    matrices = list(packed_weights(exported.model))
    assert len(matrices) == (8 if kind == "conv1d" else 2 * EXPERTS)
    operators = Counter(node.op_type for node in load(exported.path).graph.node)
    assert operators["MatMulNBits"] == len(matrices)
    sizes = stored(exported.path)
    codes = {name: shape for name, shape in sizes.items() if ".codes" in name}
    bits = sum(8 * shape[0] for shape in codes.values())
    assert bits == sum(
        np.prod(matrix.quantized.shape) * quant.get_format(matrix.quantized.format).bits
        for matrix in matrices
    )
    dense = {tuple(matrix.quantized.shape) for matrix in matrices}
    assert not dense & {tuple(shape) for shape in sizes.values()}
    assert not {shape[::-1] for shape in dense} & {tuple(shape) for shape in sizes.values()} - {(32, 2)}


def test_weights_and_adapters_are_named_as_in_the_model(conv1d: Exported, experts: Exported) -> None:
    found = stored(conv1d.path)
    assert found["transformer.h.0.mlp.c_fc.weight.codes_low"] == [32 * 128 // 4]
    assert found["transformer.h.1.attn.c_attn.lora_A.weight"] == [32, 2]
    assert found["transformer.h.1.attn.c_attn.lora_B.weight"] == [2, 96]
    found = stored(experts.path)
    assert found["model.layers.0.mlp.experts.gate_up_proj.3.codes"] == [96 * 32 // 2]
    assert found["model.layers.0.mlp.experts.gate_up_proj.lora_B.weight"] == [EXPERTS, 2, 96]


@pytest.mark.parametrize(("profile", "exact"), [("cpu", True), ("portable", False)])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mixtral])
def test_other_profiles(build: object, profile: Profile, exact: bool, tmp_path: Path) -> None:
    model = packed_by_turns(build(), ["nf4", "uint2", "int8"])
    path = silently(model, tmp_path / "onnx", profile=profile, exact=exact)
    found = verify_onnx(path, model, windows(14, 9))
    assert found.max_relative_error < 5e-6
    assert found.checks["weight_rounding"] < (WEIGHT_TOLERANCE if exact else 0.0036)
    if profile == "portable":
        assert {node.domain for node in load(path).graph.node} == {""}


@pytest.mark.parametrize("kind", ["conv1d", "experts"])
def test_merged_weights_are_dense(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    exported: Exported = request.getfixturevalue(kind)
    path = silently(exported.model, tmp_path / "onnx", adapters="merged")
    assert not any(".codes" in name or "lora" in name for name in stored(path))
    assert verify_onnx(path, exported.model, windows(14, 9)).kl < 1e-8


def test_a_dense_mixture_is_torchs(tmp_path: Path) -> None:
    model = tiny_mixtral()
    found = verify_onnx(silently(model, tmp_path / "onnx"), model, windows(14, 9))
    assert found.max_relative_error < 5e-6


def test_a_stack_read_by_something_else_is_packed_in_the_file_and_said_to_be_unpacked(
    experts: Exported, tmp_path: Path
) -> None:
    """Where the rows of a batch pick whole experts."""
    model = copy.deepcopy(experts.model)
    model.set_experts_implementation("batched_mm")
    with pytest.warns(ExportWarning, match=r"experts.gate_up_proj stays packed .* unpacks it to float32"):
        path = export_onnx(model, tmp_path / "onnx")
    assert stored(path)["model.layers.0.mlp.experts.gate_up_proj.codes"] == [EXPERTS * 96 * 32 // 2]
    assert verify_onnx(path, model, windows(14, 9)).max_relative_error < 5e-6


class ReadOneByOne(nn.Module):
    """Every expert for every row; one matrix the other way round, which no packed product can be."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(drawn(3, 64, 32))
        self.down = nn.Parameter(drawn(3, 32, 64))
        self.last = nn.Parameter(drawn(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = [functional.linear(x, self.up[index]).relu() for index in range(3)]
        total = sum(functional.linear(each, self.down[index]) for index, each in enumerate(hidden))
        return functional.linear(total, self.last) @ self.last


def test_experts_that_are_read_one_by_one(tmp_path: Path) -> None:
    model = ReadOneByOne()
    for name in ("up", "down", "last"):
        quant.loftq_parameter_(model, name, "int4", 2, 1, 32)
    with pytest.warns(ExportWarning) as told:
        path = export_onnx(model, tmp_path / "onnx", examples=drawn(5, 32))
    assert [str(warning.message).split()[0] for warning in told] == ["last"]
    # All experts read one value first.
    assert Counter(node.op_type for node in load(path).graph.node)["MatMulNBits"] == 5
    found = {check.name: check.measured for check in verify_outputs(path, model, {"x": drawn(5, 32)})}
    assert found.pop("shipped") < 0.03
    assert max(found.values()) < 5e-6


class ReadOtherwise(nn.Module):
    """Reads that look like the product of a packed matrix, and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(drawn(3, 64, 32))
        self.weight = nn.Parameter(drawn(32, 64))
        self.bias = nn.Parameter(drawn(64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        across = x[:, :3] @ self.stack.transpose(0, 1)[2]
        all_at_once = x @ self.stack.mT
        return across, all_at_once, torch.addmm(self.bias, x, self.weight, alpha=0.5, beta=2)


def test_what_only_looks_like_a_packed_product_is_none(tmp_path: Path) -> None:
    model = ReadOtherwise()
    quant.loftq_parameter_(model, "stack", "int4", 2, 1, 32)
    quant.loftq_parameter_(model, "weight", "int4", 2, 1, 32, transposed=True)
    with pytest.warns(ExportWarning) as told:
        path = export_onnx(model, tmp_path / "onnx", examples=drawn(5, 32))
    assert {str(warning.message).split()[0] for warning in told} == {"stack", "weight"}
    checks = verify_outputs(path, model, {"x": drawn(5, 32)})
    assert max(check.measured for check in checks) < 5e-6


@pytest.mark.parametrize("place", ["gate_up_proj.2", "gate_up_proj.0"])
def test_one_changed_byte_of_an_expert_is_found(experts: Exported, place: str, tmp_path: Path) -> None:
    shutil.copytree(experts.path.parent, tmp_path / "onnx")
    changed = tmp_path / "onnx" / "model.onnx"
    change_byte(changed, f"model.layers.0.mlp.experts.{place}.codes", 16)
    with pytest.raises(VerificationError, match=r"weights .* > 5e-07"):
        verify_onnx(changed, experts.model, windows(12, 8))


@pytest.mark.parametrize("kind", ["conv1d", "experts"])
def test_adapters_come_from_a_file(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    exported: Exported = request.getfixturevalue(kind)
    other = copy.deepcopy(exported.model)
    for module in other.modules():
        if isinstance(module, quant.PackedParameter):
            randomize(nn.ParameterList([module.lora_A, module.lora_B]), seed=8)
    adapter = write_adapter(other, tmp_path / "other.onnx_adapter")
    opened = open_adapter(adapter, exported.path)
    options = onnxruntime.RunOptions()
    options.add_active_adapter(opened)
    whole = export_onnx(other, tmp_path / "onnx")
    results = [run(exported.path), run(exported.path, options), run(whole)]
    assert np.abs(results[0] - results[2]).max() > 0.01
    np.testing.assert_array_equal(results[1], results[2])
    with torch.no_grad():
        next(module for module in other.modules() if isinstance(module, quant.PackedParameter)).codes[5] ^= 1
    assert base_digest(other) != base_digest(exported.model)
    with pytest.raises(ExportError, match="other packed weights"):
        open_adapter(write_adapter(other, adapter), exported.path)


def run(path: Path, options: onnxruntime.RunOptions | None = None) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path))
    ids = np.array(windows(9, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.broadcast_to(np.arange(9), ids.shape)
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), dtype=np.float32)
    return session.run(["logits"], feeds, options)[0]
