"""A verification passes what is right and refuses what is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exported_models import Exported, windows
from torch import nn

import quant
from graphprune.errors import VerificationError
from graphprune.export import agreement, verify
from graphprune.export.check import Check, raise_if_failed
from graphprune.export.verify import measure_onnx, verify_onnx


@pytest.fixture
def copy(packed: Exported, tmp_path: Path) -> Path:
    """The packed file, to be damaged."""
    shutil.copytree(packed.path.parent, tmp_path / "onnx")
    return tmp_path / "onnx" / "model.onnx"


def change_byte(path: Path, name: str, change: int) -> None:
    """Add to one byte in the middle of an initializer, in the data file."""
    proto = onnx.load(str(path), load_external_data=False)
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    data = path.parent / entries["location"]
    content = bytearray(data.read_bytes())
    place = int(entries["offset"]) + int(entries["length"]) // 2
    content[place] = (content[place] + change) % 256
    data.write_bytes(content)


def test_a_right_file_passes_with_small_numbers(packed: Exported) -> None:
    texts = windows(24, 13, 30)
    found = verify_onnx(packed.path, packed.model, texts)
    assert found.ok
    assert found.tokens == 24 + 13 + 30
    assert found.max_relative_error < 5e-6
    assert found.checks["weights"] < verify.WEIGHT_TOLERANCE
    assert 0.003 < found.checks["weight_rounding"] < 0.0036
    cells = {f"{shape} after {past}" for shape in ("1x1", "1x12", "3x12") for past in (0, 1, 7)}
    assert {"prefill", "padded_batch", "decode", "greedy", *cells} < set(found.checks)
    assert found.checks["greedy"] < found.tolerance
    assert 0 < found.kl < 0.01
    assert found.top1_agreement > 0.9


def test_a_dense_file_passes_without_rounding(dense: Exported) -> None:
    found = verify_onnx(dense.path, dense.model, windows(16, 9))
    assert found.max_abs_error < 1e-4
    assert found.kl < 1e-8
    assert "weights" not in found.checks


def test_the_model_is_as_it_was(packed: Exported) -> None:
    before = dict(packed.model.named_modules())
    packed.model.train()
    try:
        verify_onnx(packed.path, packed.model, windows(6, 5))
        assert packed.model.training
        assert dict(packed.model.named_modules()) == before
    finally:
        packed.model.eval()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.self_attn.q_proj.weight.codes", 16),
        ("model.layers.1.mlp.down_proj.weight.codes", 1),
        ("model.embed_tokens.weight.codes", 1),
    ],
)
def test_one_changed_byte_of_a_weight_is_found(packed: Exported, copy: Path, name: str, change: int) -> None:
    change_byte(copy, name, change)
    with pytest.raises(VerificationError, match=r"weights .* > 5e-07"):
        verify_onnx(copy, packed.model, windows(12, 8))


def test_a_scale_that_is_not_a_number_is_found(packed: Exported, copy: Path) -> None:
    proto = onnx.load(str(copy))
    (scales,) = (t for t in proto.graph.initializer if t.name == "model.layers.0.mlp.up_proj.weight.absmax")
    array = onnx.numpy_helper.to_array(scales).copy()
    array[3] = np.nan
    scales.CopyFrom(onnx.numpy_helper.from_array(array, scales.name))
    onnx.save(proto, str(copy))
    with pytest.raises(VerificationError, match="weights nan"):
        verify_onnx(copy, packed.model, windows(12, 8))


def test_one_changed_number_of_an_adapter_is_found(packed: Exported, packed_model: nn.Module) -> None:
    with torch.no_grad():
        packed_model.model.layers[0].mlp.up_proj.lora_B[3, 1] += 0.5
    with pytest.raises(VerificationError, match="prefill"):
        verify_onnx(packed.path, packed_model, windows(12, 8))


def test_another_scaling_is_found(packed: Exported, packed_model: nn.Module) -> None:
    packed_model.model.layers[0].mlp.up_proj.scaling *= 1.01
    with pytest.raises(VerificationError, match="prefill"):
        verify_onnx(packed.path, packed_model, windows(12, 8))


def test_a_norm_that_differs_is_found(packed: Exported, packed_model: nn.Module) -> None:
    with torch.no_grad():
        packed_model.model.norm.weight[5] *= 1.05
    with pytest.raises(VerificationError, match="decode"):
        verify_onnx(packed.path, packed_model, windows(12, 8))


@pytest.mark.parametrize(
    ("fault", "check"), [("positions", "decode"), ("past", "decode"), ("mask", "padded_batch")]
)
def test_a_cache_that_is_used_wrongly_is_found(packed: Exported, copy: Path, fault: str, check: str) -> None:
    """Faults that the plain pass of one text does not show."""
    model = ir.load(copy)
    inputs = {value.name: value for value in model.graph.inputs}
    if fault == "positions":
        count_positions_from_0(model, inputs["position_ids"])
    elif fault == "past":
        for node in model.graph:
            if "present.1.value" in [value.name for value in node.outputs]:
                node.replace_input_with(5, inputs["past_key_values.1.key"])
    else:
        for node in model.graph:
            if node.op_type == "Attention":
                node.replace_input_with(3, None)
                node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    ir.save(model, copy)
    with pytest.raises(VerificationError, match=check):
        verify_onnx(copy, packed.model, windows(14, 8))


def count_positions_from_0(model: ir.Model, position_ids: ir.Value) -> None:
    """Number the tokens of every step from 0, whatever the cache holds."""
    users = [(use.node, use.idx) for use in position_ids.uses()]
    one = ir.Value(name="one", const_value=ir.tensor(np.array(1)), type=ir.TensorType(ir.DataType.INT64))
    model.graph.register_initializer(one)
    zeros = ir.node("Sub", [position_ids, position_ids])
    ones = ir.node("Add", [zeros.outputs[0], one])
    counted = ir.node("CumSum", [ones.outputs[0], one])
    positions = ir.node("Sub", [counted.outputs[0], one])
    for number, node in enumerate((zeros, ones, counted, positions)):
        node.outputs[0].name = f"wrong_position.{number}"
    model.graph.insert_before(model.graph[0], [zeros, ones, counted, positions])
    for node, index in users:
        node.replace_input_with(index, positions.outputs[0])


def test_another_format_than_the_models_is_found(packed: Exported, packed_model: nn.Module) -> None:
    layer = packed_model.model.layers[0].mlp.up_proj
    other = quant.quantize(layer.quantized.dequantize(), "int4", 64)
    packed_model.model.layers[0].mlp.up_proj = quant.QuantLinear(
        other, None, layer.lora_A, layer.lora_B, layer.scaling
    )
    with pytest.raises(VerificationError, match="weights"):
        verify_onnx(packed.path, packed_model, windows(12, 8))


def test_a_weight_the_model_does_not_have_is_found(packed: Exported, dense: Exported) -> None:
    with pytest.raises(VerificationError, match="the model does not have"):
        verify_onnx(packed.path, dense.model, windows(12, 8))


def test_rounding_of_activations_is_bounded(packed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "LARGEST_KL", 1e-9)
    with pytest.raises(VerificationError, match=r"kl .* > 1e-09"):
        verify_onnx(packed.path, packed.model, windows(12, 8))
    monkeypatch.setattr(agreement, "LEAST_TOP1", 1.1)
    with pytest.raises(VerificationError, match=r"top1_agreement .* < 1.1"):
        verify_onnx(packed.path, packed.model, windows(12, 8))


@pytest.mark.parametrize("texts", [[], [[1, 2, 3]], [[1, 2, 3], [4]], [[1, 2], []]])
def test_comparing_nothing_is_an_error(packed: Exported, texts: list[list[int]]) -> None:
    with pytest.raises(VerificationError, match="too little"):
        verify_onnx(packed.path, packed.model, texts)


def test_a_file_that_is_not_a_model_is_refused(packed: Exported, copy: Path) -> None:
    model = ir.load(copy)
    for node in model.graph:
        if node.op_type == "Attention":
            node.op_type = "Atention"
    ir.save(model, copy)
    with pytest.raises(VerificationError, match="not a valid ONNX model"):
        verify_onnx(copy, packed.model, windows(12, 8))


def test_a_valid_file_that_does_not_run_is_refused(packed: Exported, copy: Path) -> None:
    model = ir.load(copy)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.op_type = "MatMulNBit"
    ir.save(model, copy)
    with pytest.raises(VerificationError, match="does not run"):
        verify_onnx(copy, packed.model, windows(12, 8))


def test_a_file_without_its_data_is_refused(packed: Exported, copy: Path) -> None:
    (copy.parent / "model.onnx.data").unlink()
    with pytest.raises(VerificationError, match="not a valid ONNX model"):
        verify_onnx(copy, packed.model, windows(12, 8))


def test_numbers_out_of_bounds_are_returned_where_no_error_is_wanted(
    packed: Exported, packed_model: nn.Module
) -> None:
    with torch.no_grad():
        packed_model.model.norm.weight[5] *= 1.05
    found = measure_onnx(packed.path, packed_model, windows(12, 8))
    failed = {row.name for row in found.rows if row.holds is False}
    assert not found.ok
    assert {"prefill", "decode", "1x1 after 0"} <= failed
    assert "weights" not in failed


def test_another_text_than_torchs_is_found(packed: Exported, packed_model: nn.Module) -> None:
    """Where the greatest logit is another token's, by far."""
    with torch.no_grad():
        packed_model.model.norm.weight.neg_()
    found = measure_onnx(packed.path, packed_model, windows(20, 8))
    assert found.checks["greedy"] > 0.1
    assert found.checks["greedy_agreement"] < 0.5


def test_texts_may_be_shorter_than_the_longest_past(dense: Exported) -> None:
    found = verify_onnx(dense.path, dense.model, windows(2, 2))
    assert {"1x1 after 0", "1x1 after 1", "3x1 after 1"} < set(found.checks)
    assert not any(name.endswith("after 7") for name in found.checks)


@pytest.mark.parametrize(
    ("measured", "bound", "at_least", "holds"),
    [
        (1.0, 1.0, False, True),
        (1.1, 1.0, False, False),
        (0.9, 1.0, True, False),
        (1.0, 1.0, True, True),
        (float("nan"), 1.0, False, False),
        (float("nan"), 1.0, True, False),
        (float("nan"), None, False, None),
    ],
)
def test_what_is_no_number_is_out_of_every_bound(
    measured: float, bound: float | None, at_least: bool, holds: bool | None
) -> None:
    check = Check("name", measured, bound, at_least)
    assert check.holds is holds
    if holds is False:
        with pytest.raises(VerificationError, match=f"name {measured:.3g}"):
            raise_if_failed("file", [check])
    else:
        raise_if_failed("file", [check])
