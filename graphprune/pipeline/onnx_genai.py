"""What stands beside an ONNX file: its tokenizer, and the configuration with which onnxruntime-genai opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphprune.errors import SourceError
from graphprune.export.filenames import FILE
from graphprune.files import write_json
from graphprune.trace.onnx_reading import read_onnx

_CONFIG = "genai_config.json"


def write_companions(source: Path, folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer, and the source's genai_config.json told of the new heads, beside a model.

    Args:
        source: The folder of the file that was pruned.
        folder: That of the new `model.onnx`.
        tokenizer: None where there is none.

    Raises:
        SourceError: If the source's configuration cannot be read.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    path = source / _CONFIG
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model"]["decoder"] = _fitted(config["model"]["decoder"], read_onnx(folder / FILE))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path} is no configuration of a decoder: {error!r}", "mend it, or remove it"
        ) from error
    write_json(folder / _CONFIG, config)


def _fitted(decoder: dict[str, Any], model: ir.Model) -> dict[str, Any]:
    """Return a decoder's entry for `model.onnx`; of layers that differ in heads, the most."""
    name = decoder["inputs"].get("past_key_names", "past_key_values.%d.key")
    before, _, after = name.partition("%d")
    heads = [
        value.shape[1]
        for value in model.graph.inputs
        if str(value.name).startswith(before) and str(value.name).endswith(after) and value.shape
    ]
    kept = max((size for size in heads if isinstance(size, int)), default=decoder["num_key_value_heads"])
    queries = decoder["num_attention_heads"] * kept // decoder["num_key_value_heads"]
    return {**decoder, "filename": FILE, "num_key_value_heads": kept, "num_attention_heads": queries}
