"""One engine for architectures that it knows nothing of: which groups may go, and the certificate of each."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from tiny_models import randomized

from graphprune.certify.certificate import certify
from graphprune.coupling.groups import node_groups
from graphprune.trace.model import trace

IDS = torch.arange(20).reshape(2, 10) + 3
TEXT = {"input_ids": IDS, "use_cache": False}
MASKED = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
COMMON = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
WIDE_HEADS = {**DECODER, "head_dim": 8}
GEMMA = {**WIDE_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16}
GROUPED = {"attention_heads": 2, "query_heads": 2, "head_dim": 3, "ffn": 2, "hidden": 1}
# No query heads to share a key head, and LayerNorm on the residual width, which therefore stays.
CENTRED = {"attention_heads": 2, "head_dim": 4, "ffn": 2}

CASES = {
    "qwen2, biases": ("Qwen2Config", "Qwen2ForCausalLM", DECODER, TEXT, GROUPED),
    "qwen3, norms on heads": ("Qwen3Config", "Qwen3ForCausalLM", WIDE_HEADS, TEXT, GROUPED),
    "phi3, fused projections": ("Phi3Config", "Phi3ForCausalLM", DECODER, TEXT, GROUPED),
    "gemma2, eager attention": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA, TEXT, GROUPED),
    "gpt2, transposed weights": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {**COMMON, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 32},
        TEXT,
        CENTRED,
    ),
    "gpt-neox, interleaved heads, partial rotary, parallel residual": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
        | {"num_attention_heads": 3, "hidden_size": 48},
        TEXT,
        {"attention_heads": 2, "head_dim": 5, "ffn": 2},
    ),
    "opt, learned positions": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            **COMMON,
            "hidden_size": 24,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 24,
            "max_position_embeddings": 32,
        },
        {**MASKED, "use_cache": False},
        CENTRED,
    ),
    "t5, encoder and decoder, relative positions": (
        "T5Config",
        "T5ForConditionalGeneration",
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
        {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False},
        # the encoder's output is an output of the model, so the residual width stays
        {"attention_heads": 3, "head_dim": 12, "ffn": 4},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_of_an_architecture(case):
    config_name, class_name, settings, inputs, expected = CASES[case]
    config = getattr(transformers, config_name)(**settings)
    if "eager" in case:
        config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = randomized(getattr(transformers, class_name)(config))
    groups = node_groups(trace(model, inputs))
    certificate = certify(model, groups, inputs)
    certificate.raise_if_failed()
    assert certificate.removed_effect > 1e-3
    assert Counter(group.kind for group in groups.values() if group.prunable) == expected
    assert all(group.reason for group in groups.values() if not group.prunable)
