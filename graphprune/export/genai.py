"""The configuration with which onnxruntime-genai opens an exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.filenames import FILE
from graphprune.export.shared_cache import has_shared_cache
from graphprune.files import write_json


def write_genai_config(
    folder: Path,
    *,
    hidden_size: int,
    num_attention_heads: int,
    context_length: int,
    eos_token_ids: Sequence[int],
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> Path:
    """Write `genai_config.json` beside `model.onnx`; cache and vocabulary sizes are read from the file itself.

    Layers may differ in heads and head size: the runtime reads each layer's own from the graph, and the single
    numbers in the configuration are the largest. Tokenizer files are the caller's to copy.

    Args:
        folder: Where `model.onnx` lies.
        hidden_size: Width of the residual stream.
        num_attention_heads: Query heads of a layer, the largest number.
        context_length: Most tokens that the model was made for.
        eos_token_ids: Tokens that end a text.
        bos_token_id: Token that begins one; by default the first end token.
        pad_token_id: Token for padding; by default the first end token.

    Returns:
        The path of the file.

    Raises:
        ExportError: If `model.onnx` has no cache, or no end token is given.
    """
    graph = ir.load(folder / FILE).graph
    caches = [value for value in graph.inputs if str(value.name).startswith("past_key_values.")]
    if not caches or not eos_token_ids:
        raise ExportError(
            f"{folder / FILE} with {len(caches)} cache inputs and {len(eos_token_ids)} end tokens cannot generate",
            "export a causal language model and name its end tokens",
        )
    end = eos_token_ids[0]
    model = {
        # The type only selects the decoder-only generation loop; nothing of the architecture follows from it.
        "type": "llama",
        "decoder": _decoder(graph, caches, hidden_size, num_attention_heads),
        "vocab_size": _size(graph.outputs[0], 2),
        "context_length": context_length,
        "bos_token_id": end if bos_token_id is None else bos_token_id,
        "eos_token_id": list(eos_token_ids),
        "pad_token_id": end if pad_token_id is None else pad_token_id,
    }
    search = {
        "max_length": context_length,
        "do_sample": False,
        "past_present_share_buffer": has_shared_cache(graph),
    }
    path = folder / "genai_config.json"
    write_json(path, {"model": model, "search": search})
    return path


def _decoder(graph: ir.Graph, caches: Sequence[ir.Value], hidden: int, heads: int) -> dict[str, object]:
    indices = [int(str(value.name).split(".")[1]) for value in caches]
    return {
        "filename": FILE,
        "head_size": max(_size(value, 3) for value in caches),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(_size(value, 1) for value in caches),
        "num_hidden_layers": max(indices) + 1,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ExportError(f"axis {axis} of {value.name} has no fixed size", "export the model again")
    return size
