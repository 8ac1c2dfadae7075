"""Tiny models of many architectures, random weights, built in code: what the engine's tables are measured on.

Nothing here is known to the engine: it sees the operators that `torch.export` or an ONNX file shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from plain_networks import GatedBranches, GroupedNetwork, ResidualNetwork, SharedLayers, UNet
from torch import nn

# Sizes that collide with nothing: two rows of eleven tokens, 61 words, 40 FFN channels.
IDS = (torch.arange(22) % 57).reshape(2, 11) + 3
TEXT: dict[str, Any] = {"input_ids": IDS, "use_cache": False}
MASKED: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
COMMON: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
WIDE_HEADS: dict[str, Any] = {**DECODER, "head_dim": 8}
ENCODER: dict[str, Any] = {
    "vocab_size": 61,
    "pad_token_id": 0,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return settings without some of their keys."""
    return {name: value for name, value in settings.items() if name not in names}


GEMMA: dict[str, Any] = {**WIDE_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16}
ONE_HEAD_KIND: dict[str, Any] = without(DECODER, "num_key_value_heads")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A tiny model and inputs to trace it with.

    Attributes:
        build: Makes the model; weights are random, from a seed.
        inputs: Makes the keyword arguments of its forward.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values of a sensible size, norms not all ones, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.eval()


def pretrained(
    name: str,
    settings: dict[str, Any],
    inputs: dict[str, Any],
    head: str = "ForCausalLM",
    attention: str | None = None,
) -> Architecture:
    """Return a transformers architecture by the stem of its configuration's name."""

    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**settings)
        if attention:
            config._attn_implementation = attention
        torch.manual_seed(0)
        model = getattr(transformers, name.removesuffix("Text") + head)(config)
        return randomized(model)

    return Architecture(build, lambda: dict(inputs))


TRANSFORMERS: dict[str, Architecture] = {
    "llama, grouped-query": pretrained("Llama", {**DECODER, "tie_word_embeddings": True}, TEXT),
    "llama, multi-head": pretrained("Llama", {**DECODER, "num_key_value_heads": 6}, TEXT),
    "llama, multi-query": pretrained("Llama", {**DECODER, "num_key_value_heads": 1}, TEXT),
    "llama, eager attention": pretrained("Llama", DECODER, TEXT, attention="eager"),
    "mistral": pretrained("Mistral", {**WIDE_HEADS, "sliding_window": 16}, TEXT),
    "qwen2": pretrained("Qwen2", DECODER, TEXT),
    "qwen3": pretrained("Qwen3", WIDE_HEADS, TEXT),
    "gemma2": pretrained("Gemma2", GEMMA, TEXT, attention="eager"),
    "gemma3": pretrained("Gemma3Text", GEMMA, TEXT),
    "phi3": pretrained("Phi3", DECODER, TEXT),
    "gpt2": pretrained(
        "GPT2",
        {**COMMON, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 32},
        TEXT,
        head="LMHeadModel",
    ),
    "gpt-neox": pretrained("GPTNeoX", {**ONE_HEAD_KIND, "hidden_size": 48, "num_attention_heads": 3}, TEXT),
    "gpt-j": pretrained(
        "GPTJ",
        {
            **COMMON,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "n_inner": 40,
            "n_positions": 32,
            "rotary_dim": 4,
        },
        TEXT,
    ),
    "opt": pretrained(
        "OPT",
        {
            **without(ONE_HEAD_KIND, "intermediate_size"),
            "ffn_dim": 40,
            "word_embed_proj_dim": 24,
            "num_attention_heads": 4,
        },
        {**MASKED, "use_cache": False},
    ),
    "falcon": pretrained(
        "Falcon",
        {
            **COMMON,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "ffn_hidden_size": 40,
        },
        {**MASKED, "use_cache": False},
    ),
    "falcon, multi-query": pretrained(
        "Falcon",
        {
            **COMMON,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "multi_query": True,
            "new_decoder_architecture": False,
            "ffn_hidden_size": 40,
            "alibi": False,
            "parallel_attn": True,
        },
        {**MASKED, "use_cache": False},
    ),
    "bloom": pretrained(
        "Bloom",
        {**COMMON, "hidden_size": 24, "n_layer": 2, "n_head": 4},
        {**MASKED, "use_cache": False},
    ),
    "mpt": pretrained(
        "Mpt",
        {**COMMON, "d_model": 24, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 32},
        {**MASKED, "use_cache": False},
    ),
    "cohere": pretrained("Cohere", DECODER, TEXT),
    "glm": pretrained("Glm", {**WIDE_HEADS, "partial_rotary_factor": 0.5}, TEXT),
    "olmo2": pretrained("Olmo2", DECODER, TEXT),
    "bert": pretrained("Bert", ENCODER, MASKED, head="ForMaskedLM"),
    "roberta": pretrained("Roberta", {**ENCODER, "pad_token_id": 1}, MASKED, head="ForMaskedLM"),
    "albert": pretrained("Albert", {**ENCODER, "embedding_size": 10}, MASKED, head="ForMaskedLM"),
    "distilbert": pretrained(
        "DistilBert",
        {
            "vocab_size": 61,
            "dim": 24,
            "hidden_dim": 40,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 32,
        },
        MASKED,
        head="ForMaskedLM",
    ),
    "deberta-v2": pretrained(
        "DebertaV2",
        {
            **ENCODER,
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "max_relative_positions": -1,
        },
        MASKED,
        head="ForMaskedLM",
    ),
    "modernbert": pretrained(
        "ModernBert", {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}, MASKED, head="ForMaskedLM"
    ),
    "t5": pretrained(
        "T5",
        {
            "vocab_size": 61,
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :7], "use_cache": False},
        head="ForConditionalGeneration",
    ),
    "bart": pretrained(
        "Bart",
        {
            "vocab_size": 61,
            "d_model": 24,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 36,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :7], "use_cache": False},
        head="ForConditionalGeneration",
    ),
    "vit": pretrained(
        "ViT",
        {
            **without(ENCODER, "vocab_size", "pad_token_id", "max_position_embeddings"),
            "image_size": 20,
            "patch_size": 5,
            "num_labels": 10,
        },
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 20 * 20).reshape(2, 3, 20, 20)},
        head="ForImageClassification",
    ),
    "swin": pretrained(
        "Swin",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 12,
            "depths": [2, 2],
            "num_heads": [3, 6],
            "window_size": 4,
            "num_labels": 10,
        },
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)},
        head="ForImageClassification",
    ),
    "convnext": pretrained(
        "ConvNext",
        {
            "num_channels": 3,
            "hidden_sizes": [8, 12],
            "depths": [2, 2],
            "num_stages": 2,
            "num_labels": 10,
            "image_size": 32,
        },
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)},
        head="ForImageClassification",
    ),
    "whisper": pretrained(
        "Whisper",
        {
            "vocab_size": 61,
            "num_mel_bins": 9,
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 36,
            "max_source_positions": 13,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        {
            "input_features": torch.linspace(-1, 1, 2 * 9 * 26).reshape(2, 9, 26),
            "decoder_input_ids": IDS[:, :7],
            "use_cache": False,
        },
        head="ForConditionalGeneration",
    ),
    "clip, vision": pretrained(
        "CLIPVision",
        {
            **without(ENCODER, "vocab_size", "pad_token_id", "max_position_embeddings"),
            "image_size": 20,
            "patch_size": 5,
            "projection_dim": 14,
        },
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 20 * 20).reshape(2, 3, 20, 20)},
        head="ModelWithProjection",
    ),
    "mixtral": pretrained(
        "Mixtral", {**DECODER, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}, TEXT
    ),
    "qwen2-moe": pretrained(
        "Qwen2Moe",
        {
            **DECODER,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
            "num_experts": 5,
            "num_experts_per_tok": 2,
        },
        TEXT,
    ),
    "qwen3-moe": pretrained(
        "Qwen3Moe",
        {**WIDE_HEADS, "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2},
        TEXT,
    ),
    "gpt-oss": pretrained(
        "GptOss",
        {**WIDE_HEADS, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 16},
        TEXT,
        attention="eager",
    ),
    "deepseek-v3": pretrained(
        "DeepseekV3",
        {
            **ONE_HEAD_KIND,
            "moe_intermediate_size": 20,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 14,
            "kv_lora_rank": 10,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 5,
            "num_key_value_heads": 6,
        },
        TEXT,
    ),
    "mamba": pretrained(
        "Mamba",
        {
            **COMMON,
            "hidden_size": 24,
            "state_size": 5,
            "num_hidden_layers": 2,
            "expand": 2,
            "conv_kernel": 4,
            "time_step_rank": 3,
        },
        TEXT,
    ),
    "mamba2": pretrained(
        "Mamba2",
        {
            **COMMON,
            "hidden_size": 24,
            "state_size": 5,
            "num_hidden_layers": 2,
            "expand": 2,
            "conv_kernel": 4,
            "num_heads": 6,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
        TEXT,
    ),
}


def plain(kind: type[nn.Module], shape: tuple[int, ...]) -> Architecture:
    """Return a plain network on one input called ``x``."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomized(kind())

    generator = torch.Generator().manual_seed(0)
    return Architecture(build, lambda: {"x": torch.randn(shape, generator=generator)})


PLAIN: dict[str, Architecture] = {
    "residual network": plain(ResidualNetwork, (2, 3, 16, 16)),
    "grouped convolutions": plain(GroupedNetwork, (2, 3, 8, 8)),
    "u-net": plain(UNet, (2, 3, 8, 8)),
    "gated branches": plain(GatedBranches, (2, 5)),
    "shared layers": plain(SharedLayers, (2, 5)),
}

MLP = ["gate_proj", "up_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]


def adapted(base: str, *configurations: dict[str, Any]) -> Architecture:
    """Return an architecture with LoRA adapters by PEFT, their B not zero; several share a model by name."""

    def build() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        configs = [LoraConfig(**{"r": 3, "lora_alpha": 6, **settings}) for settings in configurations]
        model: Any = get_peft_model(ARCHITECTURES[base].build(), configs[0])  # type: ignore[arg-type]
        for number, config in enumerate(configs[1:], start=2):
            model.add_adapter(f"adapter{number}", config)
        if len(configs) > 1:
            model.base_model.set_adapter(["default", *(f"adapter{n}" for n in range(2, len(configs) + 1))])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    scale = 1.0 if "magnitude" in name else 0.2
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) * scale + 0.05)
        return model.eval()

    return Architecture(build, lambda: ARCHITECTURES[base].inputs())


ARCHITECTURES: dict[str, Architecture] = {**TRANSFORMERS, **PLAIN}
ADAPTED: dict[str, Architecture] = {
    "llama + LoRA": adapted("llama, grouped-query", {"target_modules": ALL}),
    "llama + rsLoRA, attention alone": adapted(
        "llama, grouped-query", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    ),
    "llama + two adapters": adapted(
        "llama, grouped-query", {"target_modules": ALL}, {"target_modules": ["q_proj", "down_proj"], "r": 5}
    ),
    "llama + DoRA": adapted("llama, grouped-query", {"target_modules": ALL, "use_dora": True}),
    "llama + LoRA on embeddings": adapted("llama, multi-head", {"target_modules": ["embed_tokens", *MLP]}),
    "gpt2 + LoRA": adapted("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "qwen3-moe + LoRA": adapted("qwen3-moe", {"target_modules": ["q_proj", "o_proj"]}),
}
ARCHITECTURES |= ADAPTED
