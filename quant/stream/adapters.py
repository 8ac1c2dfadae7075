"""The adapters of a run in PEFT's layout, for a model whose linear layers hold the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from quant.errors import QuantError
from quant.lora_config import CONFIG_FILE, PREFIX, TENSORS_FILE, lora_config
from quant.stream.byte_copy import write_safetensors
from quant.stream.config import StreamConfig
from quant.stream.header import StoredTensor
from quant.stream.layers import Layer
from quant.stream.part import Part

FOLDER = "adapters"


def write_adapters(
    folder: Path, layers: Sequence[Layer], parts: Mapping[str, Part], config: StreamConfig
) -> None:
    """Write `adapters/adapter_model.safetensors` and its configuration below a folder.

    Raises:
        QuantError: Layers are stacked experts, for which this layout has no names.
    """
    check_adapters(layers)
    tensors: dict[str, StoredTensor] = {}
    for layer in layers:
        for factor in ("lora_A", "lora_B"):
            key = f"{PREFIX}{layer.name}.{factor}.weight"
            tensors[key] = parts[layer.name].tensors[f"{layer.name}.{factor}"]
    names = [layer.name for layer in layers]
    described = lora_config(dict.fromkeys(names, config.rank), dict.fromkeys(names, config.scaling))
    (folder / FOLDER).mkdir()
    write_safetensors(folder / FOLDER / TENSORS_FILE, tensors)
    (folder / FOLDER / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def check_adapters(layers: Sequence[Layer]) -> None:
    """Raise QuantError where PEFT's layout cannot name the layers."""
    stacked = [layer.name for layer in layers if layer.index is not None]
    if stacked:
        raise QuantError(
            f"{stacked[0]} is one of a stack, for which PEFT's layout has no name",
            "leave peft_adapters off, or exclude the experts",
        )
