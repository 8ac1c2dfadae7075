"""Opening a causal language model: a transformers folder, a hub id, or the demo model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from graphprune.errors import SourceError
from graphprune.source.demo import DEMO, demo_folder

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: For people: what the user asked for.
        location: A folder, or a hub id.
        is_local: Whether `location` is a folder.
    """

    name: str
    location: str
    is_local: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files; 0 for a hub id that is not a folder."""
        if not self.is_local:
            return 0
        return sum(file.stat().st_size for file in Path(self.location).glob("*.safetensors"))


def find_model(reference: str) -> ModelSource:
    """Resolve what the user calls a model.

    Args:
        reference: ``demo``, a path to a transformers folder, or a hub id such as ``owner/name``.

    Raises:
        SourceError: If there is no such folder, or it lacks a config or safetensors weights.
    """
    if reference == DEMO:
        return ModelSource("SmolLM2-135M-Instruct", str(demo_folder()), True)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return ModelSource(folder.resolve().name, str(folder.resolve()), True)
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
        return ModelSource(reference, reference, False)
    raise SourceError(
        f"there is no model '{reference}'",
        "give a transformers folder, a hub id such as owner/name, or 'demo'",
    )


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


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json", "give a folder that save_pretrained wrote")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise SourceError(
            f"{folder} has no safetensors weights",
            "convert them with model.save_pretrained(folder); pickled weights are not read",
        )


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
