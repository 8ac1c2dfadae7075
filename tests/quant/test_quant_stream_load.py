"""What a stream has written, in models."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stream_checkpoints import CONFIG, stored_tensors
from torch import nn

import quant
from quant import LoftQConfig, QuantError, load_quantized_, loftq, loftq_model
from quant.stream import load_checkpoint_, loftq_checkpoint


def llama(**settings: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = torch.arange(12).view(2, 6)


def weights_in_effect(folder: Path) -> dict[str, np.ndarray]:
    """Return the dense weights of a result by way of numpy: levels times scales, plus the product."""
    index, found = json.loads((folder / "quant.json").read_text()), stored_tensors(folder)
    weights = {}
    for name, entry in index["layers"].items():
        parts = {key: found[f"{name}.{key}"].numpy() for key in ("codes", "absmax", "lora_A", "lora_B")}
        codes = np.stack([parts["codes"] >> 4, parts["codes"] & 15], axis=1).reshape(-1)
        levels = quant.get_format("nf4").levels.double().numpy()[codes]
        dense = (levels.reshape(-1, entry["block_size"]) * parts["absmax"][:, None]).reshape(entry["shape"])
        weights[name] = dense + parts["lora_B"].astype(np.float64) @ parts["lora_A"].astype(np.float64)
    return weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_llama_on_the_meta_device_takes_the_result_and_runs(
    tmp_path: Path, tied: bool, shard_bytes: int
) -> None:
    accelerate = pytest.importorskip("accelerate")
    dense = llama(attention_bias=True, tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    dense.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", replace(CONFIG, shard_bytes=shard_bytes))
    with torch.no_grad():
        for name, weight in weights_in_effect(tmp_path / "out").items():
            dense.get_submodule(name).weight.copy_(torch.from_numpy(weight))
    with accelerate.init_empty_weights():
        empty = llama(attention_bias=True, tie_word_embeddings=tied)
    assert load_checkpoint_(empty.eval(), tmp_path / "out") == []
    assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(empty(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)
    loaded = llama(attention_bias=True, tie_word_embeddings=tied)
    load_quantized_(loaded, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, empty(TOKENS).logits)


SCALINGS = [{}, {"alpha": 8}, {"alpha": 3, "rslora": True}]


@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_model_in_memory_becomes_the_same(tmp_path: Path, iterations: int, scaling: dict) -> None:
    streamed, in_memory = llama(), llama()
    streamed.save_pretrained(tmp_path / "source")
    config = replace(CONFIG, iterations=iterations, **scaling)
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", config)
    load_checkpoint_(streamed, tmp_path / "out")
    plain = LoftQConfig(rank=4, iterations=iterations, block_size=16, exclude=("lm_head",), **scaling)
    loftq_model(in_memory, plain)
    assert streamed.model.layers[0].mlp.up_proj.scaling == plain.scaling
    first, second = streamed.state_dict(), in_memory.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_stays_on_the_meta_device_or_has_another_shape_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", CONFIG)
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(QuantError, match=r"on the meta device still.*inv_freq"):
        load_checkpoint_(empty, tmp_path / "out")
    half = llama().bfloat16()
    load_checkpoint_(half, tmp_path / "out")
    assert half.model.norm.weight.dtype == half(TOKENS).logits.dtype == torch.bfloat16
    model = llama()
    model.model.norm.weight = nn.Parameter(torch.ones(8))
    with pytest.raises(QuantError, match=r"model\.norm\.weight has the shape \(8,\)"):
        load_checkpoint_(model, tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_missing_file_and_a_changed_bit_of_any_file_is_named_and_the_model_left_as_it_was(
    tmp_path: Path, shard_bytes: int
) -> None:
    llama().save_pretrained(tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", replace(CONFIG, shard_bytes=shard_bytes))
    model, before = llama(), llama().state_dict()
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(QuantError, match=f"{path.name} is not the file that"):
            load_checkpoint_(model, tmp_path / "out")
        path.unlink()
        with pytest.raises(QuantError, match=f"holds no {path.name}"):
            load_checkpoint_(model, tmp_path / "out")
        path.write_bytes(whole)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert load_checkpoint_(model, tmp_path / "out") == []


def test_what_save_quantized_wrote_is_not_taken_for_a_whole_checkpoint(tmp_path: Path) -> None:
    model, _ = loftq_model(llama(), LoftQConfig(rank=4, iterations=0))
    quant.save_quantized(model, tmp_path)
    with pytest.raises(QuantError, match=r"quant\.json does not say what unquantized\.safetensors was"):
        load_checkpoint_(llama(), tmp_path)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_peft_reads_the_adapters(tmp_path: Path, scaling: dict) -> None:
    peft = pytest.importorskip("peft")
    dense = llama()
    dense.save_pretrained(tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", replace(CONFIG, peft_adapters=True, **scaling))
    packed = llama()
    load_quantized_(packed, tmp_path / "out")
    base = llama()
    with torch.no_grad():
        for name in json.loads((tmp_path / "out" / "quant.json").read_text())["layers"]:
            base.get_submodule(name).weight.copy_(packed.get_submodule(name).quantized.dequantize())
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(TOKENS).logits, packed(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_a_module_holds_itself_are_loaded_in_its_place(tmp_path: Path) -> None:
    """GPT-2's Conv1D: a checkpoint does not say that it is no linear layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, initializer_range=0.1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    dense, other = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    for block in dense.transformer.h:
        torch.nn.init.normal_(block.mlp.c_fc.bias)
    dense.save_pretrained(tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", replace(CONFIG, alpha=8))
    assert load_checkpoint_(other, tmp_path / "out") == []
    for name, parameter in dense.named_parameters():
        if name.endswith(("c_fc.weight", "c_attn.weight", "c_proj.weight")):
            key = name.removesuffix(".weight")
            seed = zlib.crc32(f"0 {key}".encode())
            expected = loftq(parameter, "nf4", 4, 2, 16, seed=seed)
            with torch.no_grad():
                parameter.copy_(expected.quantized.dequantize() + expected.lora_B @ expected.lora_A)
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_experts_written_one_by_one_are_named_with_what_to_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, num_local_experts=3,
    )  # fmt: skip
    torch.manual_seed(0)
    first, second = (transformers.MixtralForCausalLM(config) for _ in range(2))
    first.save_pretrained(tmp_path / "apart")
    loftq_checkpoint(tmp_path / "apart", tmp_path / "out", CONFIG)
    with pytest.raises(QuantError, match="is nothing in the model") as refused:
        load_checkpoint_(second, tmp_path / "out")
    assert "names in the files must be those of the model's modules" in refused.value.remedy
    first.save_pretrained(tmp_path / "stacked", save_original_format=False)
    loftq_checkpoint(tmp_path / "stacked", tmp_path / "out", CONFIG)
    assert load_checkpoint_(second, tmp_path / "out") == []
