"""One layer's result as a file of its own, which is there whole or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from quant.blockwise import check_weight
from quant.errors import QuantError
from quant.files import import_safetensors, replace_file, sha256
from quant.loftq import LoftQResult, loftq
from quant.stream.config import StreamConfig
from quant.stream.header import StoredTensor, read_header
from quant.stream.layers import Layer
from quant.stream.source import read_matrix

NOTE = "layer"
"""The one entry of a part's metadata; safetensors writes several in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A layer's finished part file.

    Attributes:
        tensors: Codes, scales and adapters by key.
        errors: As in `LoftQResult`.
    """

    tensors: dict[str, StoredTensor]
    errors: tuple[float, ...]


def write_part(path: Path, layer: Layer, config: StreamConfig, device: str) -> None:
    """Run LoftQ on a layer and write the result, and its hash beside it.

    Raises:
        QuantError: The weight cannot be read or quantized; the message names the layer.
    """
    save_file = import_safetensors().save_file
    result = _compress(layer, config, device)
    # Divided, so that the product is right after the model has multiplied it by the scaling.
    root = math.sqrt(config.scaling)
    named = {**result.quantized.parts(), "lora_A": result.lora_A / root, "lora_B": result.lora_B / root}
    tensors = {f"{layer.name}.{key}": tensor.cpu().contiguous() for key, tensor in named.items()}
    note = json.dumps({"name": layer.name, "errors": result.errors})

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, {NOTE: note})
        # Before the part: one without its hash is never there.
        _hash_path(path).write_text(sha256(temporary), "utf-8")

    replace_file(path, write)


def read_part(path: Path, layer: Layer) -> Part | None:
    """Return the finished part of a layer, or None where there is none that is whole, to the bit."""
    try:
        if sha256(path) != _hash_path(path).read_text("utf-8"):
            return None
        header = read_header(path)
        note = json.loads(header.metadata[NOTE])
        if note["name"] == layer.name:
            return Part(tensors=header.tensors, errors=tuple(float(error) for error in note["errors"]))
    except (FileNotFoundError, QuantError, KeyError, TypeError, ValueError):
        return None
    return None


def _hash_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _compress(layer: Layer, config: StreamConfig, device: str) -> LoftQResult:
    if layer.bias is not None:
        # Copied as it is, but one that is not finite would spoil all that the layer puts out.
        check_weight(read_matrix(layer.bias), f"{layer.name}.bias")
    weight = read_matrix(layer.weight, layer.index).to(device)
    try:
        return loftq(
            weight,
            layer.format,
            config.rank,
            config.iterations,
            config.block_size,
            seed=layer.seed,
            scale_storage=config.scale_storage,
        )
    except QuantError as error:
        raise QuantError(f"{layer.name}: {error.problem}", error.remedy) from error
