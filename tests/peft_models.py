"""Tiny models with PEFT's adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS = torch.arange(24).view(2, 12) % 50

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=16, initializer_range=0.1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.1, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return seeded(lambda: transformers.MixtralForCausalLM(config))


TARGETS: dict[Callable[[], nn.Module], dict[str, Any]] = {
    llama: {"target_modules": LINEARS},
    gpt2: {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    mixtral: {
        "target_modules": LINEARS[:4],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}


def adapted(build: Callable[[], nn.Module], **options: Any) -> nn.Module:
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 8, **TARGETS[build], **options})
    return seeded(lambda: peft.get_peft_model(build(), config))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if type(module) is peft.tuners.lora.layer.Linear
    }


def effective(layer: Any, adapter: str = "default") -> torch.Tensor:
    """(out, in): what a LoRA layer multiplies by, in float64, by the formula of the LoRA paper."""
    weight = layer.get_base_layer().weight.detach().double()
    lora_A, lora_B = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
    return (weight.T if layer.fan_in_fan_out else weight) + layer.scaling[adapter] * lora_B @ lora_A
