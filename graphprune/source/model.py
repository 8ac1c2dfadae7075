"""Opening a causal language model: a transformers folder, a hub id, or the demo model."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from graphprune.errors import SourceError
from graphprune.source.location import ModelSource


def load_model(
    source: ModelSource,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    kind: Any = AutoModelForCausalLM,
) -> nn.Module:
    """Load a model in evaluation mode, frozen; a causal language model, unless another class is given.

    Raises:
        SourceError: If transformers cannot open it.
    """
    transformers_logging.disable_progress_bar()
    model = _open(source, kind, dtype=dtype, use_safetensors=True)
    model.eval()
    model.requires_grad_(False)
    return model


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer that stands beside the model.

    Raises:
        SourceError: If there is none.
    """
    return _open(source, AutoTokenizer)


def load_config(source: ModelSource) -> Any:
    """Load the model's configuration."""
    return _open(source, AutoConfig)


def _open(source: ModelSource, loader: Any, **options: Any) -> Any:
    try:
        return loader.from_pretrained(source.location, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = (
            "check that the folder holds a causal language model that stock transformers opens"
            if source.is_local
            else "without a network, give a local transformers folder instead (--model PATH)"
        )
        raise SourceError(f"cannot open {source.location}: {first}", remedy) from error


def model_class(config: Any) -> Any:
    """Return the transformers class that a configuration names, or the one of causal language models."""
    named = (getattr(config, "architectures", None) or [""])[0]
    return getattr(transformers, named, None) or AutoModelForCausalLM


def example_inputs(model: Any) -> dict[str, Any]:
    """Return inputs to trace a transformers model with: 2 × 11 tokens and no cache, or two pictures.

    Raises:
        SourceError: If the model reads something else.
    """
    config, reads = model.config, getattr(model, "main_input_name", "input_ids")
    if reads == "pixel_values":
        side = getattr(config, "image_size", 224)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)}
    if reads != "input_ids":
        raise SourceError(
            f"{type(model).__name__} reads '{reads}', for which there is no example",
            "trace it in Python, with inputs of your own: graphprune.trace(model, inputs)",
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(22) % vocabulary).reshape(2, 11)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens[:, :7]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT hides the signature
    if "use_cache" in inspect.signature(inner.forward).parameters:
        inputs["use_cache"] = False
    return inputs
