"""Encoder-decoders as two files with caches: names, what each holds, and that they compute what torch does."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from encoder_decoders import MODELS, encoder_decoder, encoder_examples, quantized, texts
from exported_models import Exported
from onnx_encoder_decoder import generate
from test_onnx_export import load, shapes
from torch import nn
from transformers import BartConfig, BartForSequenceClassification

import graphprune as gp
import quant
from graphprune.errors import ExportError, SourceError, VerificationError
from graphprune.export.adapter_file import BASE, base_digest, open_adapter, write_adapter
from graphprune.export.encoder_decoder import has_halves
from graphprune.export.encoder_decoder_runtime import OnnxEncoderDecoder
from graphprune.export.generation import Generator
from graphprune.export.layouts import Profile
from graphprune.export.verify_encoder_decoder import measure_encoder_decoder
from graphprune.export.write import export_onnx

FILES = ("encoder.onnx", "decoder.onnx")
LAYERS, HEADS, SIZE, WIDTH, VOCABULARY = 2, 2, 16, 32, 67
WEIGHTS = {"T5": "dense", "Bart": "nf4", "Whisper": "int4", "M2M100": "pruned", "Speech2Text": "bfloat16"}
PACKED = ("nf4", "int4")
PORTABLE = "Whisper"
PRUNED = {
    "model.decoder.layers.0.self_attn:attention_heads": [0],
    "model.decoder.layers.1.encoder_attn:attention_heads": [1],
    "model.decoder.layers.1:ffn": list(range(9)),
}
CROSSING = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
SIDES = ("decoder", "encoder")
CACHE = [(layer, part) for layer in range(LAYERS) for part in ("key", "value")]


def in_dtype(examples: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in examples.items()
    }


def changed(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a model with weights of its kind in `WEIGHTS`, and examples for it."""
    model, examples = encoder_decoder(name), encoder_examples(name)
    if WEIGHTS[name] == "bfloat16":
        return model.bfloat16(), in_dtype(examples, torch.bfloat16)
    if WEIGHTS[name] == "pruned":
        inputs = {**examples, "decoder_input_ids": torch.tensor(texts(2, 7)), "use_cache": False}
        groups = gp.node_groups(gp.trace(model, inputs))
        return gp.shrink(model, groups, PRUNED), examples
    quantized(model, WEIGHTS[name])
    for layer in model.modules():
        if isinstance(layer, quant.QuantLinear):
            layer.scaling = 1.5
    return model, examples


def written(name: str, folder: Path) -> Exported:
    """Return a model that is exported without a look at its examples where it reads text."""
    model, examples = changed(name)
    given = None if "input_ids" in examples else examples
    profile: Profile = "portable" if name == PORTABLE else "cpu"
    metadata = {"graphprune": "a test"}
    return Exported(model, export_onnx(model, folder, examples=given, profile=profile, metadata=metadata))


class Pairs(dict[str, Exported]):
    """Exported models by name, each written when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> Exported:
        self[name] = written(name, self._folder / name)
        return self[name]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(params=WEIGHTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def arrays(name: str, rows: int = 2) -> dict[str, np.ndarray]:
    return {key: tensor[:rows].numpy() for key, tensor in encoder_examples(name).items()}


def torch_logits(model: nn.Module, inputs: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    tensors = {key: torch.as_tensor(value) for key, value in inputs.items()}
    with torch.no_grad():
        return model(**tensors, decoder_input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_both_files_are_torchs_with_exact_activations(pairs: Pairs, name: str) -> None:
    exported = pairs[name]
    dtype = exported.model.dtype  # type: ignore[union-attr]
    examples = in_dtype(encoder_examples(name), dtype)
    found = gp.verify_encoder_decoder(exported.path, exported.model, examples, texts(4, 20))
    assert all(parameter.dtype == dtype for parameter in exported.model.parameters())
    checks = {
        key: value
        for key, value in found.checks.items()
        if key not in ("weight_rounding", "greedy_agreement")
    }
    assert max(checks.values()) < 1e-5
    cells = {f"{shape} after {past}" for shape in ("1x1", "1x12", "3x1", "3x12") for past in (0, 1, 7)}
    assert cells | {"encoder", "prefill", "decode", "greedy"} <= checks.keys()
    assert ("padded_batch" in checks) == ("attention_mask" in encoder_examples(name))
    assert ("weights" in checks) == (WEIGHTS[name] in PACKED)
    assert found.tokens == 4 * 20
    assert found.kl < 1e-3


def test_names_and_symbols_are_those_of_the_documentation(pairs: Pairs) -> None:
    def ends(file: str) -> tuple[dict[str, list[int | str]], dict[str, list[int | str]]]:
        graph = load(pairs["T5"].path / file).graph
        return shapes(list(graph.input)), shapes(list(graph.output))

    source: list[int | str] = ["batch_size", "sequence_length"]
    crossed = ["batch_size", HEADS, "encoder_sequence_length", SIZE]
    assert ends("encoder.onnx") == (
        {"input_ids": source, "attention_mask": source},
        {"last_hidden_state": [*source, WIDTH]}
        | {
            f"present.{n}.encoder.{part}": ["batch_size", HEADS, "sequence_length", SIZE] for n, part in CACHE
        },
    )
    own = {length: ["batch_size", HEADS, f"{length}_sequence_length", SIZE] for length in ("past", "total")}
    assert ends("decoder.onnx") == (
        {"input_ids": source, "encoder_attention_mask": ["batch_size", "encoder_sequence_length"]}
        | {f"past_key_values.{n}.decoder.{part}": own["past"] for n, part in CACHE}
        | {f"past_key_values.{n}.encoder.{part}": crossed for n, part in CACHE},
        {"logits": [*source, VOCABULARY]}
        | {f"present.{n}.decoder.{part}": own["total"] for n, part in CACHE},
    )


def test_an_encoder_without_a_mask_has_none_in_either_file(pairs: Pairs) -> None:
    inputs = [shapes(list(load(pairs["Whisper"].path / file).graph.input)) for file in FILES]
    assert inputs[0]["input_features"] == ["batch_size", 8, 40]
    assert not any("mask" in key for each in inputs for key in each)


def test_a_mask_of_other_length_than_what_is_encoded_has_a_name_of_its_own(
    pairs: Pairs,
) -> None:
    """Two frames become one state."""
    inputs = shapes(list(load(pairs["Speech2Text"].path / "decoder.onnx").graph.input))
    assert inputs["encoder_attention_mask"] == ["batch_size", "encoder_input_length"]
    assert inputs["past_key_values.0.encoder.key"] == ["batch_size", HEADS, "encoder_sequence_length", SIZE]


def test_each_file_holds_the_weights_that_it_reads_and_no_others(pairs: Pairs, name: str) -> None:
    """Keys and values of the attention to the encoder are in the encoder's file alone, all else of a decoder is not."""
    model: Any = pairs[name].model
    inner = {id(part) for part in (*model.get_encoder().modules(), *model.get_encoder().parameters())}
    tied = {
        key.rpartition(".")[0]
        for key, part in model.named_parameters(remove_duplicate=False)
        if id(part) in inner
    }
    encoder = tied | {key for key, module in model.named_modules() if id(module) in inner}
    decoder = {key for key, _ in model.named_modules()} - encoder
    crossing = {key for key in decoder if key.endswith(CROSSING)}
    assert len(crossing) == 2 * LAYERS

    def stored(file: str) -> set[str]:
        names = [str(tensor.name) for tensor in load(pairs[name].path / file).graph.initializer]
        owners = (
            max((k for k in encoder | decoder if n.startswith(f"{k}.")), key=len, default="") for n in names
        )
        return {owner for owner in owners if owner}

    assert crossing <= stored("encoder.onnx") <= encoder | crossing
    assert not stored("decoder.onnx") & crossing
    assert stored("decoder.onnx") - tied <= decoder


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_valid_and_every_node_of_it_is_needed(pairs: Pairs, name: str, file: str) -> None:
    path = pairs[name].path / file
    onnx.checker.check_model(str(path), full_check=True)
    graph = ir.load(path).graph
    assert {node.domain for node in graph} <= ({""} if name == PORTABLE else {"", "com.microsoft"})
    needed, rest = set(), [value.producer() for value in graph.outputs]
    while rest:
        node = rest.pop()
        if node is not None and node not in needed:
            needed.add(node)
            rest += [value.producer() for value in node.inputs if value is not None]
    assert needed == set(graph)
    assert all(value.uses() for value in graph.initializers.values())
    base = {BASE: base_digest(pairs[name].model)} if WEIGHTS[name] in PACKED else {}
    assert ir.load(path).metadata_props == {"graphprune": "a test", **base}


@pytest.mark.parametrize("name", ["T5", "Bart", "Whisper", "M2M100"])
def test_attention_is_as_few_operators_as_can_be(pairs: Pairs, name: str) -> None:
    """One for each layer of the encoder, two for each of the decoder; all but those to the encoder split heads."""
    found = [
        [node for node in ir.load(pairs[name].path / file).graph if node.op_type == "Attention"]
        for file in FILES
    ]
    layers = 2 if name == "T5" else 1
    assert [len(nodes) for nodes in found] == [layers, 2 * LAYERS]
    flat = [sum("q_num_heads" in node.attributes for node in nodes) for nodes in found]
    assert flat == [layers, LAYERS]


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_rows_of_a_padded_batch_are_what_they_are_alone(pairs: Pairs, name: str) -> None:
    pair = OnnxEncoderDecoder(pairs[name].path, exact=True)
    inputs, ids = arrays(name), np.array(texts(2, 9))
    inputs["attention_mask"][1, 6:] = 0
    together = pair.encode(inputs).logits(ids)
    for row, length in enumerate((11, 6)):
        alone = {key: array[row : row + 1, :length] for key, array in inputs.items()}
        assert error(together[row : row + 1], pair.encode(alone).logits(ids[row : row + 1])) < 1e-5


def test_greedy_texts_are_those_of_transformers(pairs: Pairs) -> None:
    """By the runtime, by a Generator over it, and by the example that users copy, all rows at once."""
    exported: Any = pairs["T5"]
    expected = exported.model.generate(
        **encoder_examples("T5"), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, 1:].numpy()
    stepped = np.stack(list(generate(exported.path, arrays("T5"), 1, 12)), axis=1)
    np.testing.assert_array_equal(stepped, expected)
    decoder = OnnxEncoderDecoder(exported.path, threads=1).encode(arrays("T5", rows=1))
    assert decoder.greedy([1], 12) == expected[0].tolist()
    assert list(Generator(decoder).generate([1], 12)) == expected[0].tolist()


def test_the_example_writes_until_the_end_token(pairs: Pairs, tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **arrays("T5", rows=1))
    free = [int(tokens[0]) for tokens in generate(pairs["T5"].path, arrays("T5", rows=1), 1, 12)]
    script = Path(__file__).parents[2] / "examples" / "onnx_encoder_decoder.py"
    command = [
        sys.executable,
        str(script),
        str(pairs["T5"].path),
        str(tmp_path / "inputs.npz"),
        "1",
        str(free[4]),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [int(token) for token in found] == free[: free.index(free[4]) + 1]


def fed_anew(
    path: Path, inputs: dict[str, np.ndarray], ids: np.ndarray, adapters: dict[str, Path]
) -> np.ndarray:
    """Return logits of a pair whose files run with other adapters."""
    fixed: dict[str, np.ndarray] = {}
    for file in FILES:
        options = onnxruntime.RunOptions()
        opened = open_adapter(adapters[file], path / file)  # a session keeps no reference of its own
        options.add_active_adapter(opened)
        session = onnxruntime.InferenceSession(str(path / file), providers=["CPUExecutionProvider"])
        if file == "decoder.onnx":
            empty = np.zeros((len(ids), HEADS, 0, SIZE), np.float32)
            past = {f"past_key_values.{n}.decoder.{part}": empty for n, part in CACHE}
            feeds = {"input_ids": ids, "encoder_attention_mask": inputs["attention_mask"], **past, **fixed}
            return session.run(["logits"], feeds, options)[0]
        names = [f"present.{n}.encoder.{part}" for n, part in CACHE]
        arrays = session.run(names, inputs, options)
        fixed = {
            key.replace("present", "past_key_values"): array for key, array in zip(names, arrays, strict=True)
        }
    raise AssertionError


def test_other_adapters_are_fed_to_each_file(pairs: Pairs, tmp_path: Path) -> None:
    """A pair with another model's adapters is that model, as far as NF4 by a table of bytes is."""
    exported = pairs["Bart"]
    other = copy.deepcopy(exported.model)
    for layer in other.modules():
        if isinstance(layer, quant.QuantLinear) and layer.lora_A is not None:
            layer.lora_A = nn.Parameter(layer.lora_A.detach().flip(0) * 9)
    with pytest.raises(ExportError, match=r"does not take .* from outside"):
        open_adapter(write_adapter(other, tmp_path / "all.onnx_adapter"), exported.path / "decoder.onnx")
    adapters = {
        file: write_adapter(other, tmp_path / f"{file}.onnx_adapter", model_file=exported.path / file)
        for file in FILES
    }
    inputs, ids = arrays("Bart"), np.array(texts(2, 5))
    before, expected = (torch_logits(model, inputs, ids) for model in (exported.model, other))
    found = fed_anew(exported.path, inputs, ids, adapters)
    assert np.abs(found - expected).max() < 0.05 * np.abs(before - expected).max()
    with pytest.raises(ExportError, match="takes no adapters"):
        write_adapter(other, tmp_path / "x", model_file=pairs["T5"].path / "encoder.onnx")


def test_a_pruned_model_has_heads_of_its_own_in_each_layer(pairs: Pairs) -> None:
    inputs = shapes(list(load(pairs["M2M100"].path / "decoder.onnx").graph.input))
    heads = {side: [inputs[f"past_key_values.{n}.{side}.key"][1] for n in range(LAYERS)] for side in SIDES}
    assert heads == {"decoder": [1, 2], "encoder": [2, 1]}


def test_examples_say_which_of_both_forms_is_meant() -> None:
    model, examples = encoder_decoder("Bart"), encoder_examples("Bart")
    assert has_halves(model, None)
    assert has_halves(model, examples)
    assert has_halves(model, examples["input_ids"])
    assert not has_halves(model, {**examples, "decoder_input_ids": examples["input_ids"]})
    assert not has_halves(encoder_decoder("T5"), {**examples, "use_cache": False})
    assert not has_halves(model.get_decoder(), None)  # type: ignore[operator]
    assert not has_halves(nn.Linear(3, 3), None)
    config = BartConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1
    )
    assert not has_halves(BartForSequenceClassification(config), examples)


def test_axes_that_the_user_names(pairs: Pairs, tmp_path: Path) -> None:
    """Checked before anything is traced."""
    model, examples = pairs["T5"].model, encoder_examples("T5")
    with pytest.raises(ExportError, match="names the input 'pixels'"):
        export_onnx(model, tmp_path / "onnx", examples=examples, dynamic_axes={"pixels": {0: "batch"}})
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_of_other_inputs_than_text_wants_examples(pairs: Pairs, tmp_path: Path) -> None:
    model = pairs["Whisper"].model
    with pytest.raises(ExportError, match=r"reads input_features, of unknown sizes\n.*examples="):
        export_onnx(model, tmp_path / "onnx")
    with pytest.raises(ExportError, match="does not run on the examples"):
        export_onnx(model, tmp_path / "onnx", examples={"input_features": torch.zeros(2, 8, 13)})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def broken(pairs: Pairs, tmp_path: Path) -> Path:
    """A copy of T5's files, to be damaged."""
    return Path(shutil.copytree(pairs["T5"].path, tmp_path / "onnx"))


def measured(folder: Path, exported: Exported) -> dict[str, float]:
    found = measure_encoder_decoder(folder, exported.model, encoder_examples("T5"), texts(3, 20))
    return found.checks


def test_a_cache_that_is_wrong_is_found(pairs: Pairs, broken: Path) -> None:
    """The present keys of two layers are swapped: a prefill does not mind, whatever follows does."""
    model = ir.load(broken / "decoder.onnx")
    first, second = (value for value in model.graph.outputs if str(value.name).endswith(".decoder.key"))
    first.name, second.name = second.name, first.name
    ir.save(model, broken / "decoder.onnx", external_data="decoder.onnx.data")
    found = measured(broken, pairs["T5"])
    assert found["prefill"] < 1e-5 < 1e-3 < found["decode"]
    assert found["3x12 after 7"] > 1e-3
    with pytest.raises(VerificationError, match="decode "):
        gp.verify_encoder_decoder(broken, pairs["T5"].model, encoder_examples("T5"), texts(3, 20))


def test_a_mask_that_is_not_heeded_is_found(pairs: Pairs, broken: Path) -> None:
    model = ir.load(broken / "decoder.onnx")
    mask = next(value for value in model.graph.inputs if value.name == "encoder_attention_mask")
    heedless = ir.node("Max", [mask, ir.Value(name="one")])
    one = ir.tensor(np.array(1, dtype=np.int64), name="one")
    value = ir.Value(name="one", const_value=one, shape=ir.Shape([]), type=ir.TensorType(one.dtype))
    model.graph.register_initializer(value)
    heedless.replace_input_with(1, value)
    mask.replace_all_uses_with(heedless.outputs[0])
    heedless.replace_input_with(0, mask)
    model.graph.insert_before(model.graph[0], heedless)
    ir.save(model, broken / "decoder.onnx", external_data="decoder.onnx.data")
    found = measured(broken, pairs["T5"])
    assert found["prefill"] < 1e-5 < 1e-3 < found["padded_batch"]


def test_another_model_is_found(pairs: Pairs) -> None:
    other = copy.deepcopy(pairs["T5"])
    with torch.no_grad():
        other.model.get_encoder().final_layer_norm.weight[3] += 0.1  # type: ignore[operator, union-attr]
    assert measured(pairs["T5"].path, other)["encoder"] > 1e-3


def test_what_cannot_be_compared_is_refused(pairs: Pairs, broken: Path) -> None:
    exported = pairs["T5"]
    for windows in ([], texts(1, 9), [[1], [1, 2]]):
        with pytest.raises(VerificationError, match="too little to verify"):
            gp.verify_encoder_decoder(exported.path, exported.model, encoder_examples("T5"), windows)
    ids = {"input_ids": encoder_examples("T5")["input_ids"]}
    with pytest.raises(VerificationError, match="takes the inputs input_ids, attention_mask, the examples"):
        gp.verify_encoder_decoder(exported.path, exported.model, ids, texts(2, 9))
    both = {**encoder_examples("T5"), "decoder_input_ids": ids["input_ids"]}
    with pytest.raises(
        VerificationError, match="with these examples is not written as an encoder and a decoder"
    ):
        gp.verify_encoder_decoder(exported.path, exported.model, both, texts(2, 9))
    shutil.copy(pairs["Bart"].path / "encoder.onnx", broken)
    shutil.copy(pairs["Bart"].path / "encoder.onnx.data", broken)
    (broken / "decoder.onnx").unlink()
    with pytest.raises(SourceError):
        OnnxEncoderDecoder(broken)


def test_a_decoder_that_reads_the_encoders_states_themselves_is_refused(tmp_path: Path) -> None:
    model: Any = encoder_decoder("T5")
    states: list[torch.Tensor] = []
    model.decoder.block[0].layer[1].register_forward_pre_hook(
        lambda _, args, kwargs: states.append(kwargs["key_value_states"]), with_kwargs=True
    )
    model.decoder.final_layer_norm.register_forward_hook(lambda _, args, output: output + states[-1].mean())
    with pytest.raises(ExportError, match="EncoderStates is read"):
        export_onnx(model, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_takes_one_number_of_tokens_only_is_refused(tmp_path: Path) -> None:
    model: Any = encoder_decoder("Marian")
    model.model.decoder.layers[0].register_forward_hook(
        lambda _, args, output: output.reshape(-1, 3 if output.shape[1] == 3 else output.shape[1], WIDTH)
    )
    with pytest.raises(ExportError, match="takes one sequence_length only: input_ids is"):
        export_onnx(model, tmp_path / "onnx")


def test_a_mask_may_be_left_out_where_nothing_is_padding(pairs: Pairs) -> None:
    pair, ids = OnnxEncoderDecoder(pairs["T5"].path), np.array(texts(2, 5))
    without = pair.encode({"input_ids": arrays("T5")["input_ids"]}).logits(ids)
    np.testing.assert_array_equal(without, pair.encode(arrays("T5")).logits(ids))


def test_the_models_of_the_table_are_all_of_a_kind() -> None:
    for name in MODELS:
        assert has_halves(encoder_decoder(name), encoder_examples(name))
