"""A file without its model: what is checked of it is what its operators, shapes and data say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported_models import Exported

from graphprune.errors import VerificationError
from graphprune.export.verify import TOLERANCE
from graphprune.export.verify_alone import measure_alone
from graphprune.export.verify_decoder import compare_shapes, exact_decoder
from graphprune.export.verify_file import check_file


@pytest.fixture
def copy(packed: Exported, tmp_path: Path) -> Path:
    """The packed file, to be damaged."""
    shutil.copytree(packed.path.parent, tmp_path / "onnx")
    return tmp_path / "onnx" / "model.onnx"


@pytest.mark.parametrize("kind", ["dense", "packed", "learned_positions"])
def test_a_right_file_agrees_with_itself(kind: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(kind)
    checks = measure_alone(exported.path, tolerance=TOLERANCE)
    assert {"padded_batch", "decode", "1x1 after 7", "1x12 after 1", "3x12 after 7"} < {
        c.name for c in checks
    }
    assert "prefill" not in {check.name for check in checks}
    assert all(check.holds for check in checks)
    assert max(check.measured for check in checks) < 1e-5


def first_cache_value_is_a_key(model: ir.Model) -> None:
    inputs = {value.name: value for value in model.graph.inputs}
    for node in model.graph:
        if "present.1.value" in [value.name for value in node.outputs]:
            node.replace_input_with(5, inputs["past_key_values.1.key"])


def masks_are_not_read(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Attention":
            node.replace_input_with(3, None)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def positions_begin_at_0(model: ir.Model) -> None:
    inputs = {value.name: value for value in model.graph.inputs}
    uses = [(use.node, use.idx) for use in inputs["position_ids"].uses()]
    least = ir.node("ReduceMin", [inputs["position_ids"]], {"keepdims": 1})
    from_zero = ir.node("Sub", [inputs["position_ids"], least.outputs[0]])
    for name, node in (("least", least), ("from_zero", from_zero)):
        node.outputs[0].name = name
    model.graph.insert_before(model.graph[0], [least, from_zero])
    for node, index in uses:
        node.replace_input_with(index, from_zero.outputs[0])


@pytest.mark.parametrize(
    ("damage", "failing"),
    [
        (first_cache_value_is_a_key, {"decode", "1x1 after 7", "3x12 after 1"}),
        (masks_are_not_read, {"padded_batch", "3x12 after 0"}),
        (positions_begin_at_0, {"decode", "1x12 after 7"}),
    ],
)
def test_a_cache_a_mask_or_positions_used_wrongly_are_found(
    copy: Path, damage: Callable[[ir.Model], None], failing: set[str]
) -> None:
    model = ir.load(copy)
    damage(model)
    ir.save(model, copy)
    checks = measure_alone(copy, tolerance=TOLERANCE)
    assert failing <= {check.name for check in checks if check.holds is False}


def test_a_cache_that_forgets_a_token_is_found(copy: Path) -> None:
    model = ir.load(copy)
    kept = next(value for value in model.graph.outputs if value.name == "present.1.value")
    kept.name = "kept.1.value"
    numbers = [ir.tensor(np.array([number]), name=f"number.{number}") for number in (1, 10**6, 2)]
    first, last, axis = (ir.Value(name=number.name, const_value=number) for number in numbers)
    for value in (first, last, axis):
        model.graph.register_initializer(value)
    cut = ir.node("Slice", [kept, first, last, axis])
    cut.outputs[0].name = "present.1.value"
    cut.outputs[0].type, cut.outputs[0].shape = kept.type, kept.shape
    model.graph.append(cut)
    model.graph.outputs[list(model.graph.outputs).index(kept)] = cut.outputs[0]
    ir.save(model, copy)
    with pytest.raises(VerificationError, match="the cache after 1 texts of 1 tokens"):
        check_shapes_of(copy)


def check_shapes_of(path: Path) -> None:
    decoder = exact_decoder(path)
    compare_shapes(decoder, lambda text: decoder.logits(np.array([text]))[0], [[5, 6, 7]])


def edit_first_external(path: Path, change: Callable[[onnx.TensorProto, dict[str, str]], None]) -> str:
    """Change where the first tensor with external data says that it lies; return its name."""
    proto = onnx.load(str(path), load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    change(tensor, entries)
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return tensor.name


def location(value: str) -> Callable[[onnx.TensorProto, dict[str, str]], None]:
    return lambda tensor, entries: entries.update(location=value)


def far_offset(tensor: onnx.TensorProto, entries: dict[str, str]) -> None:
    entries["offset"] = str(10**9)


def short_length(tensor: onnx.TensorProto, entries: dict[str, str]) -> None:
    entries["length"] = str(int(entries["length"]) - 4)


@pytest.mark.parametrize(
    "change",
    [location("../secret"), location("/etc/hostname"), location("none"), far_offset, short_length],
)
def test_data_that_is_not_where_or_as_long_as_it_is_declared_is_found(
    copy: Path, change: Callable[[onnx.TensorProto, dict[str, str]], None]
) -> None:
    (copy.parent.parent / "secret").write_bytes(b"0" * 10**6)
    edit_first_external(copy, change)
    with pytest.raises(VerificationError, match="not a valid ONNX model"):
        check_file(copy)


def test_a_link_out_of_the_folder_is_not_followed(copy: Path) -> None:
    data = copy.parent / "model.onnx.data"
    data.rename(copy.parent.parent / "elsewhere")
    data.symlink_to(copy.parent.parent / "elsewhere")
    with pytest.raises(VerificationError, match="not a valid ONNX model"):
        check_file(copy)


def test_shapes_that_contradict_each_other_are_found(tmp_path: Path) -> None:
    """By following numbers alone: what Reshape gets is computed from a shape."""
    shape = onnx.helper.make_node("Shape", ["x"], ["shape"])
    reshape = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [shape, reshape],
        "contradiction",
        [value("x", onnx.TensorProto.FLOAT, [2, 3])],
        [value("y", onnx.TensorProto.FLOAT, [2, 4])],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), tmp_path / "x.onnx"
    )
    with pytest.raises(VerificationError, match="not a valid ONNX model"):
        check_file(tmp_path / "x.onnx")


def test_what_is_no_model_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(np.random.default_rng(0).bytes(400))
    for name in ("x.onnx", "none.onnx"):
        with pytest.raises(VerificationError, match=name):
            check_file(tmp_path / name)
