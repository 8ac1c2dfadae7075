"""Models in float16 and bfloat16: stored to the bit, computed in float32, and left as they were."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exported_models import tiny_llama, tiny_uneven_qwen2, windows
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quant
from graphprune.export.halves import as_stored, in_float32
from graphprune.export.verify import verify_onnx
from graphprune.export.verify_outputs import verify_outputs
from graphprune.export.write import export_onnx

HALVES = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}


def content(model: nn.Module) -> dict[str, tuple[int, torch.dtype, torch.Tensor]]:
    return {name: (t.data_ptr(), t.dtype, t.clone()) for name, t in held(model).items()}


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def assert_same(model: nn.Module, before: dict[str, tuple[int, torch.dtype, torch.Tensor]]) -> None:
    for name, tensor in held(model).items():
        pointer, dtype, numbers = before[name]
        assert (tensor.data_ptr(), tensor.dtype) == (pointer, dtype)
        assert torch.equal(tensor, numbers)


@given(st.integers(0, 2**16 - 1), st.sampled_from(list(HALVES)))
def test_every_number_of_16_bits_is_stored_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[bits - 2**16 if bits >= 2**15 else bits]], dtype=torch.int16).view(dtype)
    stored = as_stored(tensor)
    assert stored.dtype == (np.float16 if dtype == torch.float16 else ml_dtypes.bfloat16)
    assert stored.view(np.uint16).item() == bits


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("build", [tiny_llama, tiny_uneven_qwen2])
def test_a_decoder_is_stored_as_it_is(build, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build().to(dtype)
    before = content(model)
    path = export_onnx(model, tmp_path / "onnx")
    assert verify_onnx(path, model, windows(20, 12)).max_relative_error < 2e-5
    assert_same(model, before)
    stored = {value.name: value.const_value for value in ir.load(path).graph.initializers.values()}
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    for name in matrices:
        tensor = stored[name]
        assert tensor.dtype.value == HALVES[dtype]
        assert tensor.tobytes() == as_stored(model.get_parameter(name)).tobytes()
    # The tied head is not there a second time.
    assert len(
        [tensor for tensor in stored.values() if tensor.dtype.value == HALVES[dtype] and tensor.size > 64]
    ) == len(matrices)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_packed_of_it_is_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama().to(dtype)
    config = quant.LoftQConfig(
        format="nf4", block_size=32, rank=2, scale_storage="float16", exclude=("down",)
    )
    quant.loftq_model(model, config)
    before = content(model)
    path = export_onnx(model, tmp_path / "onnx")
    assert verify_onnx(path, model, windows(20, 12)).max_relative_error < 2e-5
    assert_same(model, before)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_function_takes_and_gives_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(16, 5)).to(dtype).eval()
    )
    examples = {"input": torch.randn(2, 3, 6, 6).to(dtype)}
    before = content(model)
    path = export_onnx(model, tmp_path / "onnx", examples=examples)
    checks = {check.name: check.measured for check in verify_outputs(path, model, examples)}
    assert checks["examples"] < 1e-5
    assert_same(model, before)
    graph = onnx.load(path, load_external_data=False).graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {
        onnx.TensorProto.FLOAT
    }


def test_an_error_within_puts_everything_back() -> None:
    model = tiny_llama().to(torch.bfloat16)
    before = content(model)
    seen = set()
    with pytest.raises(ZeroDivisionError), in_float32(model):  # noqa: PT012
        seen = {parameter.dtype for parameter in model.parameters()}
        raise ZeroDivisionError
    assert seen == {torch.float32}
    assert_same(model, before)
