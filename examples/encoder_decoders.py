"""Tiny encoder-decoders, random weights, built in code; and how far their exported files are from torch.

python examples/encoder_decoders.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import randomized
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import graphprune as gp
import quant

VOCABULARY, WIDTH, HEADS, FFN = 67, 32, 2, 64
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
LAYERS = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    **TOKENS,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "T5": {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 16,
        "d_ff": FFN,
        "num_layers": 2,
        "num_heads": HEADS,
        "feed_forward_proj": "gated-gelu",
        **TOKENS,
    },
    "Bart": {**LAYERS, "max_position_embeddings": 64},
    "Marian": {**LAYERS, "max_position_embeddings": 64, "decoder_vocab_size": VOCABULARY},
    "M2M100": {**LAYERS, "max_position_embeddings": 64},
    "Speech2Text": {
        **LAYERS,
        "input_feat_per_channel": 8,
        "conv_channels": 16,
        "num_conv_layers": 1,
        "conv_kernel_sizes": (3,),
        "max_source_positions": 64,
        "max_target_positions": 64,
    },
    "Whisper": {**LAYERS, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
}
MODELS: dict[str, Callable[[str], nn.Module]] = {
    "T5": lambda name: _pretrained(name, "ForConditionalGeneration"),
    "Bart": lambda name: _pretrained(name, "ForConditionalGeneration"),
    "Marian": lambda name: _pretrained(name, "MTModel"),
    "M2M100": lambda name: _pretrained(name, "ForConditionalGeneration"),
    "Speech2Text": lambda name: _pretrained(name, "ForConditionalGeneration"),
    "Whisper": lambda name: _pretrained(name, "ForConditionalGeneration"),
    "ViT and GPT-2": lambda _: _vision(),
}


def encoder_decoder(name: str) -> nn.Module:
    """Return one of `MODELS`."""
    return randomized(MODELS[name](name))


def encoder_examples(name: str) -> dict[str, torch.Tensor]:
    """Return two rows of what its encoder reads, of sizes that collide with nothing."""
    generator = torch.Generator().manual_seed(3)
    if name == "Whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    if name == "Speech2Text":
        frames = torch.randn(2, 17, 8, generator=generator)
        return {"input_features": frames, "attention_mask": torch.ones(2, 17, dtype=torch.long)}
    if name not in SETTINGS:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def texts(count: int, length: int) -> list[list[int]]:
    """Return random texts as a decoder is given them, from its start token on."""
    drawn = torch.randint(3, VOCABULARY, (count, length - 1), generator=torch.Generator().manual_seed(4))
    return [[TOKENS["decoder_start_token_id"], *row] for row in drawn.tolist()]


def quantized(model: nn.Module, weights: str) -> nn.Module:
    """Quantize a model's linear layers in place, with adapters; or leave it ``dense``."""
    if weights != "dense":
        quant.loftq_model(model, quant.LoftQConfig(format=weights, block_size=32, rank=4, iterations=1))
    return model


def measured(name: str, weights: str) -> Any:
    """Return what a verification of an exported model measures."""
    model, examples = quantized(encoder_decoder(name), weights), encoder_examples(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = gp.export_onnx(model, Path(scratch) / "onnx", examples=examples)
        return gp.verify_encoder_decoder(folder, model, examples, texts(8, 20))


def main() -> None:
    """Print the table of the export's README."""
    columns = ("encoder", "prefill", "decode", "padded_batch")
    others = ("after a past", "greedy", "same text", "top-1 as shipped", "KL as shipped")
    table = Table("model", "weights", *columns, *others)
    for name, weights in track(list(_rows()), console=Console(stderr=True)):
        found = measured(name, weights)
        worst = max(error for check, error in found.checks.items() if " after " in check)
        numbers = [*(found.checks.get(column) for column in columns), worst, found.checks["greedy"]]
        table.add_row(
            name,
            weights,
            *("" if number is None else f"{number:.1e}" for number in numbers),
            f"{found.checks['greedy_agreement']:.0%}",
            f"{found.top1_agreement:.3f}",
            f"{found.kl:.1e}",
        )
    Console(width=200).print(table)


def _rows() -> Iterator[tuple[str, str]]:
    for name in MODELS:
        yield name, "dense"
        if name in ("T5", "Bart", "Whisper"):
            yield from ((name, format) for format in ("nf4", "int4"))


def _pretrained(name: str, head: str) -> nn.Module:
    settings = getattr(transformers, f"{name}Config")(**SETTINGS[name])
    return getattr(transformers, f"{name}{head}")(settings)


def _vision() -> nn.Module:
    encoder = transformers.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=4,
    )
    decoder = transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        n_positions=64,
        vocab_size=VOCABULARY,
        add_cross_attention=True,
        **TOKENS,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config=config)


if __name__ == "__main__":
    main()
