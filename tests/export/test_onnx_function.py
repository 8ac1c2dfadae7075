"""Models that are no cached decoders: every kind is written from examples alone, and computes what torch does."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_models import Exported, randomize
from function_models import (
    FUNCTIONS,
    Inputs,
    bert_classifier,
    drawn,
    encoder_decoder,
    perceptron,
    residual_network,
    shared_table,
    vision_transformer,
)
from test_onnx_export import load, shapes
from test_onnx_matrix import quantized_by_turns
from torch import nn

import quant
from graphprune.errors import ExportError, TraceWarning, VerificationError
from graphprune.export.layouts import PROFILES, Profile
from graphprune.export.named_tensors import named_tensors
from graphprune.export.verify import WEIGHT_TOLERANCE
from graphprune.export.verify_outputs import measure_outputs, verify_outputs
from graphprune.export.write import export_onnx


def measured(path: Path, model: nn.Module, inputs: Inputs, **options: object) -> dict[str, float]:
    return {check.name: check.measured for check in verify_outputs(path, model, inputs, **options)}


def ends(path: Path) -> tuple[dict[str, list[int | str]], dict[str, list[int | str]]]:
    graph = load(path).graph
    overridable = {tensor.name for tensor in graph.initializer}
    inputs = {name: s for name, s in shapes(list(graph.input)).items() if name not in overridable}
    return inputs, shapes(list(graph.output))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_dense_model_is_torchs_at_every_size(kind: str, tmp_path: Path) -> None:
    model, inputs = FUNCTIONS[kind]()
    path = export_onnx(model, tmp_path / "onnx", examples=inputs)
    found = measured(path, model, inputs)
    assert len(found) > 3  # the examples, two sizes of the batch, and as it is
    assert max(found.values()) < 1e-5
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize(
    ("kind", "profile", "exact"),
    [
        (kind, profile, exact)
        for kind, (profile, exact) in zip(
            [kind for kind in FUNCTIONS if kind not in ("shared_table", "decoder_without_cache")],
            itertools.cycle([("cpu", False), ("portable", False), ("cuda", False), ("cpu", True)]),
        )
    ],
)
def test_every_format_by_turns(kind: str, profile: Profile, exact: bool, tmp_path: Path) -> None:
    model, inputs = FUNCTIONS[kind]()
    quantized_by_turns(model, first=sorted(PROFILES).index(profile) + len(kind))
    randomize(nn.ParameterList(p for name, p in model.named_parameters() if "lora" in name), seed=4)
    path = export_onnx(model, tmp_path / "onnx", examples=inputs, profile=profile, exact=exact)
    found = measured(path, model, inputs)
    assert found.pop("weight_rounding") < (WEIGHT_TOLERANCE if exact else 0.0036)
    assert found.pop("shipped") < 0.03
    assert max(found.values()) < 2e-5
    domains = {node.domain for node in load(path).graph.node}
    assert domains == ({""} if profile == "portable" else {"", "com.microsoft"})


def test_axes_of_one_size_have_one_readable_name(tmp_path: Path) -> None:
    model, inputs = encoder_decoder()
    batch, own = "batch_size", "decoder_input_ids_sequence_length"
    assert ends(export_onnx(model, tmp_path / "onnx", examples=inputs)) == (
        {
            "input_ids": [batch, "sequence_length"],
            "attention_mask": [batch, "sequence_length"],
            "decoder_input_ids": [batch, own],
        },
        {"logits": [batch, own, 99], "encoder_last_hidden_state": [batch, "sequence_length", 32]},
    )


def test_outputs_have_the_models_names(tmp_path: Path) -> None:
    model, inputs = FUNCTIONS["bert_with_all_states"]()
    _, outputs = ends(export_onnx(model, tmp_path / "bert", examples=inputs))
    states = [f"hidden_states.{index}" for index in range(2)]
    assert list(outputs) == ["last_hidden_state", "pooler_output", *states]
    model, inputs = residual_network()
    _, outputs = ends(export_onnx(model, tmp_path / "residual", examples=inputs["x"]))
    assert list(outputs) == ["output", "output_1", "output_2"]


def test_an_input_keeps_its_name_where_a_parameter_and_an_output_have_it_too(tmp_path: Path) -> None:
    model, inputs = shared_table()
    path = export_onnx(model, tmp_path / "onnx", examples=inputs)
    found, outputs = ends(path)
    assert list(found) == ["ids", "scale"]
    assert list(outputs) == ["scores", "output_ids"]
    stored = {tensor.name: list(tensor.dims) for tensor in load(path).graph.initializer}
    assert stored["table.weight"] == [99, 32]
    assert [shape for shape in stored.values() if len(shape) == 2] == [[99, 32]]


def test_a_packed_table_that_is_multiplied_by_keeps_its_bits(tmp_path: Path) -> None:
    model, inputs = shared_table()
    model.table = quant.QuantEmbedding(quant.quantize(model.table.weight.detach(), "uint4", 32))
    path = export_onnx(model, tmp_path / "onnx", examples=inputs)
    operators = [node.op_type for node in load(path).graph.node]
    assert (operators.count("GatherBlockQuantized"), operators.count("MatMulNBits")) == (1, 1)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in load(path).graph.initializer}
    assert sizes["table.weight.codes"] == 99 * 32 // 2
    assert max(sizes.values()) == sizes["table.weight.codes"]
    assert max(error for name, error in measured(path, model, inputs).items() if name != "shipped") < 1e-5


def test_axes_that_the_user_names(tmp_path: Path) -> None:
    model, inputs = residual_network()
    axes = {"x": {0: "pictures", 2: "height", -1: "width"}}
    path = export_onnx(model, tmp_path / "onnx", examples=inputs, dynamic_axes=axes)
    found, outputs = ends(path)
    assert found == {"x": ["pictures", 3, "height", "width"]}
    assert outputs["output_1"] == ["pictures", 32, "height", "width"]
    sizes = {"pictures": (1, 3), "height": (5, 16), "width": (8, 9)}
    checks = measured(path, model, inputs, sizes=sizes)
    assert "pictures 3, height 16, width 9" in checks
    assert len(checks) == 2 + 8


def test_an_example_of_one_leaves_the_batch_free(tmp_path: Path) -> None:
    model, inputs = bert_classifier()
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    path = export_onnx(model, tmp_path / "onnx", examples=first)
    assert ends(path)[1] == {"logits": ["batch_size", 3]}
    assert measured(path, model, inputs)["batch_size 3, sequence_length 1"] < 1e-5


def test_what_is_one_for_a_whole_batch_stays_one(tmp_path: Path) -> None:
    model, inputs = bert_classifier()
    inputs["position_ids"] = torch.arange(11)[None]
    path = export_onnx(model, tmp_path / "onnx", examples=inputs)
    assert ends(path)[0]["position_ids"] == [1, "sequence_length"]
    assert max(measured(path, model, inputs).values()) < 1e-5


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.T @ torch.ones(2, 3)


def test_a_size_that_the_model_fixes_is_told(tmp_path: Path) -> None:
    with pytest.warns(TraceWarning, match="example's sizes alone: x axis 0 is 2"):
        path = export_onnx(FixedBatch(), tmp_path / "onnx", examples=drawn(2, 6))
    assert ends(path)[0] == {"x": [2, 6]}
    with pytest.raises(ExportError, match="only sizes of the example: x axis 0 is 2"):
        export_onnx(FixedBatch(), tmp_path / "other", examples=drawn(2, 6), dynamic_axes={"x": {0: "batch"}})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"y": {0: "batch"}}, "names the input 'y'.*\n.*x"),
        ({"x": {4: "batch"}}, r"axis 4 of x, whose shape is \(2, 3, 8, 8\)"),
        ({"x": {0: "size", 1: "size"}}, "size is 2 and, on axis 1 of x, 3"),
    ],
)
def test_axes_that_are_not_there_are_refused(
    axes: dict[str, dict[int, str]], message: str, tmp_path: Path
) -> None:
    model, inputs = residual_network()
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "onnx", examples=inputs, dynamic_axes=axes)
    with pytest.raises(ExportError, match="there are none"):
        export_onnx(model, tmp_path / "onnx", dynamic_axes=axes)
    assert list(tmp_path.iterdir()) == []


def test_examples_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    model, _ = vision_transformer()
    for examples, message in (
        ({"pixels": drawn(2, 3)}, "does not run on the examples"),
        ({"pixel_values": drawn(2, 4, 32, 32)}, "does not run on the examples"),
        (7, "not a int"),
    ):
        with pytest.raises(ExportError, match=message):
            export_onnx(model, tmp_path / "onnx", examples=examples)
    with pytest.raises(ExportError, match="without tensors"):
        export_onnx(nn.Identity(), tmp_path / "onnx", examples={"input": 3})


def test_torchs_own_settings_are_as_they_were(tmp_path: Path) -> None:
    model, inputs = FUNCTIONS["torch_encoder"]()
    before = torch.backends.mha.get_fastpath_enabled()
    export_onnx(model.train(), tmp_path / "onnx", examples=inputs)
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert model.training


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Inputs]:
    model, inputs = bert_classifier()
    return Exported(
        model, export_onnx(model, tmp_path_factory.mktemp("bert") / "onnx", examples=inputs)
    ), inputs


def test_another_model_is_found(classifier: tuple[Exported, Inputs]) -> None:
    exported, inputs = classifier
    other, _ = bert_classifier()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.bias[3] += 0.1
    with pytest.raises(VerificationError, match=r"examples .* > 0.0001.*batch_size 1, sequence_length 1 "):
        verify_outputs(exported.path, other, inputs)


def test_an_input_that_the_file_does_not_take_is_found(tmp_path: Path) -> None:
    model, inputs = bert_classifier()
    fixed = {**inputs, "attention_mask": None}
    path = export_onnx(model, tmp_path / "onnx", examples=fixed)
    with pytest.raises(
        VerificationError, match="takes the inputs input_ids, token_type_ids, the examples are"
    ):
        verify_outputs(path, model, inputs)


def test_sizes_that_the_model_refuses_are_an_error_that_names_them(
    classifier: tuple[Exported, Inputs],
) -> None:
    exported, inputs = classifier
    with pytest.raises(VerificationError, match="does not take batch_size 1, sequence_length 33"):
        verify_outputs(exported.path, exported.model, inputs, sizes={"sequence_length": (33,)})


def test_rounding_as_shipped_is_bounded(tmp_path: Path) -> None:
    model, inputs = perceptron()
    quant.loftq_model(model, quant.LoftQConfig(format="int4", block_size=32, rank=2, iterations=1))
    path = export_onnx(model, tmp_path / "onnx", examples=inputs)
    (shipped,) = (check for check in measure_outputs(path, model, inputs) if check.name == "shipped")
    assert 1e-4 < shipped.measured < 0.03
    with torch.no_grad():
        model[2].weight.neg_()
    (shipped,) = (check for check in measure_outputs(path, model, inputs) if check.name == "shipped")
    assert shipped.holds is False


def test_adapters_of_an_encoder_can_be_fed_anew(tmp_path: Path) -> None:
    model, inputs = bert_classifier()
    quant.loftq_model(model, quant.LoftQConfig(format="int8", block_size=32, rank=2, iterations=1))
    path = export_onnx(model, tmp_path / "onnx", examples=inputs, exact=True)
    session = onnxruntime.InferenceSession(str(path))
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    (before,) = session.run(["logits"], feeds)
    name = "bert.encoder.layer.0.intermediate.dense"
    layer = model.get_submodule(name)
    layer.lora_B = nn.Parameter(drawn(96, 2))
    layer.scaling = 1.0
    feeds[f"{name}.lora_A.weight"] = layer.lora_A.detach().numpy().T
    feeds[f"{name}.lora_B.weight"] = layer.lora_B.detach().numpy().T
    (after,) = session.run(["logits"], feeds)
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    assert np.abs(after - expected).max() < 0.2 * np.abs(expected - before).max()


def test_names_of_tensors_within_containers() -> None:
    one, two, three = (torch.tensor(number) for number in range(3))
    assert [name for name, _ in named_tensors({"a": one, "b": (two, None, [three])})] == ["a", "b.0", "b.2.0"]
    assert [name for name, _ in named_tensors((one, (two, {"c": three})))] == [
        "output",
        "output_1.0",
        "output_1.1.c",
    ]


def test_a_module_that_computes_more_than_its_base_is_traced_as_it_is(tmp_path: Path) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = randomize(nn.Sequential(Doubled(8, 5)), seed=3)
    path = export_onnx(model, tmp_path / "onnx", examples=drawn(4, 8))
    assert measured(path, model, {"input": drawn(4, 8)})["examples"] < 1e-5
    assert "0.weight" in {tensor.name for tensor in load(path).graph.initializer}
