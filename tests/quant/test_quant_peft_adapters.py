"""Adapters of packed layers, from and to PEFT's files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft_models import TOKENS, adapted, gpt2, llama, logits, lora_layers, mixtral, seeded
from torch import nn

from quant import (
    LoftQConfig,
    QuantError,
    QuantLinear,
    loftq_model,
    loftq_parameter_,
    mix_for_bits,
    mix_for_budget,
)
from quant.bridges.peft import loftq_peft_
from quant.bridges.peft_adapters import (
    adapters_from_peft_,
    adapters_to_peft,
    dequantize_linears_,
    load_peft_adapters_,
    save_peft_adapters,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


def packed_llama() -> nn.Module:
    """Different ranks and scalings, as after training."""
    model = llama()
    loftq_model(model, LoftQConfig(rank=4, exclude=("lm_head", "down_proj")))
    loftq_model(model, LoftQConfig(rank=6, include=("down_proj",), exclude=("lm_head",)))
    model.model.layers[0].mlp.up_proj.scaling = 0.3
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    first.lora_A = second.lora_A  # tied
    return model.eval()


def test_saved_adapters_load_into_peft_over_the_dequantized_base(tmp_path: Path) -> None:
    model = packed_llama()
    wanted = logits(model)
    save_peft_adapters(model, tmp_path)
    base = copy.deepcopy(model)
    assert len(dequantize_linears_(base)) == 14
    assert not torch.allclose(logits(base), wanted, atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)
    assert {layer.scaling["default"] for layer in lora_layers(loaded).values()} == {1.0, 0.3}
    assert {layer.r["default"] for layer in lora_layers(loaded).values()} == {4, 6}


def test_saved_adapters_load_into_peft_over_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from quant.bridges.bitsandbytes import model_to_bitsandbytes_

    model = llama()
    loftq_model(model, LoftQConfig(rank=4, exclude=("lm_head", "down_proj")))
    wanted = logits(model)
    save_peft_adapters(model, tmp_path)
    model_to_bitsandbytes_(model)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path)).train()  # eval mode rounds to bfloat16
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)


def test_peft_over_a_packed_base_becomes_packed_layers_with_adapters(tmp_path: Path) -> None:
    model = adapted(llama, lora_alpha=16, rank_pattern={"q_proj": 4}, use_rslora=True)
    loftq_peft_(model, "nf4", 2, packed=True)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.add_(0.01)  # trained
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert sorted(load_peft_adapters_(base, tmp_path)) == sorted(
        name for name, module in base.named_modules() if isinstance(module, QuantLinear)
    )
    torch.testing.assert_close(logits(base), wanted, rtol=1e-4, atol=1e-4)


def test_conv1d_adapters_go_both_ways() -> None:
    model, names = gpt2(), ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"]
    for name in names:
        loftq_parameter_(model, f"{name}.weight", "nf4", 4, 2, transposed=True)
    wanted = logits(model)
    state, config = adapters_to_peft(model)
    assert config["target_modules"] == names
    assert config["fan_in_fan_out"] is True
    base = gpt2()
    with torch.no_grad():
        for name in names:
            packed = model.get_submodule(name).parametrizations["weight"][0]
            base.get_submodule(name).weight.copy_(packed.quantized.dequantize().T)
    loaded = peft.get_peft_model(base, peft.LoraConfig(**config))
    peft.set_peft_model_state_dict(loaded, state)
    torch.testing.assert_close(logits(loaded.eval()), wanted, rtol=1e-4, atol=1e-4)
    for name in names:
        nn.init.zeros_(model.get_submodule(name).parametrizations["weight"][0].lora_B)
    assert not torch.allclose(logits(model), wanted, atol=1e-4)
    adapters_from_peft_(model, peft.get_peft_model_state_dict(loaded), config)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_a_layer_whose_name_ends_anothers_is_not_mixed_up_with_it() -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.up, model.inner = nn.Linear(16, 16), nn.Module()
        model.inner.up = nn.Linear(16, 16)
        model.forward = lambda input: model.inner.up(model.up(input))
        return model

    model = build()
    loftq_model(model, LoftQConfig(rank=2, block_size=16, include=("^up",)))
    _, config = adapters_to_peft(model)
    assert config["target_modules"] == ["up"]
    loaded = peft.get_peft_model(build(), peft.LoraConfig(**config))
    assert list(lora_layers(loaded)) == ["up"]


def test_adapters_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    model = packed_llama()
    state, config = adapters_to_peft(model)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    wanted = logits(model)
    for change, message in [
        ({key: state[key][:, 1:]}, r"model\.layers\.0\.mlp\.up_proj has factors"),
        ({key.replace("lora_A.weight", "lora_magnitude_vector.weight"): torch.ones(96)}, "magnitude"),
        ({key.replace("up_proj", "nothing"): state[key]}, r"mlp\.nothing, which is no packed layer"),
        ({key.replace("layers.0.mlp.up_proj", "lm_head"): state[key]}, "lm_head, which is no packed layer"),
    ]:
        with pytest.raises(QuantError, match=message):
            adapters_from_peft_(model, {name: each * 2 for name, each in state.items()} | change, config)
    with pytest.raises(QuantError, match="has factors"):
        adapters_from_peft_(model, {name: each for name, each in state.items() if name != key}, config)
    with pytest.raises(QuantError, match="lacks r or lora_alpha"):
        adapters_from_peft_(model, {name: each * 2 for name, each in state.items()}, {"r": 4})
    assert torch.equal(logits(model), wanted)
    with pytest.raises(QuantError, match="no packed layer"):
        adapters_to_peft(llama())
    stacked = mixtral()
    loftq_parameter_(stacked, "model.layers.0.mlp.experts.down_proj", "nf4", 4, 1)
    with pytest.raises(QuantError, match="is no linear layer and no Conv1D"):
        adapters_to_peft(stacked)


def test_a_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=r"holds no adapter_model\.safetensors"):
        load_peft_adapters_(packed_llama(), tmp_path)


def test_experts_packed_without_peft_start_nearer_to_the_float_model_too() -> None:
    wanted, distances = logits(mixtral()), []
    for iterations in (0, 5):
        model = mixtral()
        loftq_model(model, LoftQConfig(rank=8, iterations=iterations, exclude=("lm_head",)))
        for layer in range(2):
            for key in ("gate_up_proj", "down_proj"):
                loftq_parameter_(model, f"model.layers.{layer}.mlp.experts.{key}", "nf4", 8, iterations)
        distances.append(float((logits(model) - wanted).norm()))
        model(input_ids=TOKENS).logits.sum().backward()
        factors = [each for name, each in model.named_parameters() if "experts" in name and "lora_B" in name]
        assert all(float(each.grad.abs().sum()) > 0 for each in factors)
    assert distances[1] < 0.85 * distances[0]


def test_adapters_that_are_not_fresh_are_refused() -> None:
    """A second time would take the quantized base for the weight, and discard what was learned."""
    model = adapted(llama)
    loftq_peft_(model, "nf4", 1)
    wanted = logits(model)
    with pytest.raises(QuantError, match="is not zero any more"):
        loftq_peft_(model, "nf4", 1)
    assert torch.equal(logits(model), wanted)
    with pytest.raises(QuantError, match="nonsense, which has no adapter"):
        loftq_peft_(adapted(llama), "nf4", 1, covariances={"model.nonsense": torch.eye(64)})
    other = seeded(
        lambda: peft.get_peft_model(
            llama(), peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
        )
    )
    with pytest.raises(QuantError, match="is IA3, not LoRA"):
        loftq_peft_(other, "nf4", 1)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_adapters_are_refused(tmp_path: Path, file: str) -> None:
    model = packed_llama()
    save_peft_adapters(model, tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-20])
    wanted = logits(model)
    with pytest.raises(QuantError, match="damaged file"):
        load_peft_adapters_(model, tmp_path)
    assert torch.equal(logits(model), wanted)


def test_a_peft_model_is_for_the_bridge_alone() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    layers = list(model.modules())
    config = LoftQConfig(rank=2, iterations=1)
    for call in (
        lambda: loftq_model(model, config),
        lambda: loftq_model(model, LoftQConfig(exclude=("lora_",))),
        lambda: mix_for_bits(model, config, 8),
        lambda: mix_for_budget(model, config, 10**9),
    ):
        with pytest.raises(
            QuantError, match=r"q_proj is a layer of PEFT's[^→]*→ .*bridges\.peft\.loftq_peft_"
        ):
            call()
    assert list(model.modules()) == layers
    loftq_model(model.unload(), config)
