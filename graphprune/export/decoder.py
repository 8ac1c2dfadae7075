"""A causal language model as a function of flat tensors: ids, mask, positions, and the cache of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from graphprune.errors import ExportError
from graphprune.export.axes import BATCH, SEQUENCE
from graphprune.export.simplify import name_dimensions
from graphprune.export.traceable import Traceable

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
PAST = "past_sequence_length"
TOTAL = "total_sequence_length"

_EXAMPLES = "write models that are no decoders from examples: export_onnx(model, folder, examples=inputs)"

# Sizes of the example that is traced. None is 0 or 1, and no two are equal, so that none is taken for another.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """Where a layer keeps its keys and values.

    Attributes:
        index: The layer's index in the cache; indices may have holes.
        key: (heads, head size) of the keys.
        value: (heads, head size) of the values.
    """

    index: int
    key: tuple[int, int]
    value: tuple[int, int]


class CachedDecoder(nn.Module):
    """Computes `(logits, [present keys, present values of each layer])` from flat tensors.

    Args:
        model: A transformers causal language model that takes a `DynamicCache`.
        layers: Its cache layers, from `cache_layers`.
    """

    def __init__(self, model: nn.Module, layers: list[CacheLayer]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one step; `past` holds key, value, key, value, ..., each (batch, heads, past, head size)."""
        cache = DynamicCache()
        for layer, key, value in zip(self.layers, past[::2], past[1::2], strict=True):
            cache.update(key, value, layer.index)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [output.past_key_values.layers[layer.index] for layer in self.layers]
        return output.logits, [tensor for layer in present for tensor in (layer.keys, layer.values)]


def traceable_decoder(model: nn.Module) -> Traceable:
    """Return a causal language model as the tracer takes it: one graph for prefill and decoding.

    Raises:
        ExportError: If it does not keep plain keys and values of every token in a `DynamicCache`.
    """
    layers = cache_layers(model)
    return Traceable(
        module=CachedDecoder(model, layers),
        arguments=example_inputs(layers),
        dynamic_shapes=dynamic_shapes(layers),
        input_names=[*TOKEN_INPUTS, *cache_names(layers, "past_key_values")],
        output_names=["logits", *cache_names(layers, "present")],
        name_axes=partial(_name_axes, layers=layers),
        graph_name="decoder",
        remedy="check that it runs with a DynamicCache and explicit position_ids",
    )


def cache_layers(model: nn.Module) -> list[CacheLayer]:
    """Return the model's cache layers, found by running it once on two tokens.

    Raises:
        ExportError: If the model does not keep plain keys and values of every token.
    """
    cache = DynamicCache()
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        try:
            output = model(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                use_cache=True,
            )
        except Exception as error:  # whatever a forward raises that takes no such inputs
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(
                f"the model does not run as a decoder with a cache: {reason}", _EXAMPLES
            ) from error
    layers = filled_layers(cache, tokens=2)
    if not layers or getattr(output, "past_key_values", None) is None:
        raise ExportError(f"{type(model).__name__} gives no key-value cache back", _EXAMPLES)
    return layers


def filled_layers(cache: DynamicCache, tokens: int) -> list[CacheLayer]:
    """Return the layers of a cache that holds so many tokens.

    Raises:
        ExportError: If a layer does not hold plain keys and values of every token.
    """
    layers = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            continue
        if keys.dim() != 4 or keys.shape[2] != tokens or values.shape[2] != tokens:
            raise ExportError(
                f"cache layer {index} holds keys of shape {tuple(keys.shape)} after {tokens} tokens",
                "export models whose cache is (batch, heads, tokens, head size)",
            )
        layers.append(CacheLayer(index=index, key=_heads(keys), value=_heads(values)))
    return layers


def example_inputs(layers: list[CacheLayer]) -> tuple[Any, ...]:
    """Return the small inputs with which `CachedDecoder` is traced."""
    total = _PAST + _SEQUENCE
    past = [
        torch.zeros(_BATCH, heads, _PAST, size)
        for layer in layers
        for heads, size in (layer.key, layer.value)
    ]
    ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long)
    mask = torch.ones(_BATCH, total, dtype=torch.long)
    positions = torch.arange(_PAST, total).repeat(_BATCH, 1)
    return ids, mask, positions, past


def dynamic_shapes(layers: list[CacheLayer]) -> tuple[Any, ...]:
    """Return which axes of `example_inputs` are free.

    One named dimension is shared by all layers: with a symbol for each of them, tracing takes three times as
    long. The mask's length is `past + sequence`, which the tracer finds by itself.
    """
    batch, sequence, past = (torch.export.Dim(name) for name in (BATCH, SEQUENCE, PAST))
    tokens = {0: batch, 1: sequence}
    mask = {0: batch, 1: torch.export.Dim.AUTO}
    return tokens, mask, tokens, [{0: batch, 2: past} for _ in range(2 * len(layers))]


def cache_names(layers: list[CacheLayer], prefix: str) -> list[str]:
    """Return `prefix.N.key`, `prefix.N.value` for each layer, in the order of the flat cache."""
    return [f"{prefix}.{layer.index}.{part}" for layer in layers for part in ("key", "value")]


def _heads(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[1], tensor.shape[3]


def _name_axes(graph: ir.Graph, layers: list[CacheLayer]) -> None:
    tokens = (BATCH, SEQUENCE)
    past: list[tuple[int | str | None, ...]] = []
    present: list[tuple[int | str | None, ...]] = []
    for layer in layers:
        for heads, size in (layer.key, layer.value):
            past.append((BATCH, heads, PAST, size))
            present.append((BATCH, heads, TOTAL, size))
    name_dimensions(graph.inputs[: len(TOKEN_INPUTS) + len(past)], [tokens, (BATCH, TOTAL), tokens, *past])
    name_dimensions(graph.outputs, [(BATCH, SEQUENCE, None), *present])
