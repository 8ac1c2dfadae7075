"""An encoder-decoder as two functions of flat tensors: what is computed once, and one step of the decoder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from graphprune.errors import ExportError, TraceError
from graphprune.export.axes import BATCH, SEQUENCE, DynamicAxes, checked_axes, guessed_axes, name_symbols
from graphprune.export.axes import widened as without_ones
from graphprune.export.decoder import PAST, TOTAL, CacheLayer, filled_layers
from graphprune.export.encoder_decoder_runtime import ENCODER_MASK, MASK
from graphprune.export.function import with_tensors
from graphprune.export.named_tensors import named_tensors
from graphprune.export.simplify import name_dimensions
from graphprune.export.stand_ins import opaque
from graphprune.export.traceable import Traceable
from graphprune.trace.inputs import keyword_inputs

ENCODED = "encoder_sequence_length"
ENCODER_INPUT = "encoder_input_length"

_STATES = "EncoderStates"
_REMEDY = "check that it runs with an EncoderDecoderCache"
_TEXT = (2, 7)


def has_halves(model: nn.Module, examples: Any) -> bool:
    """Return whether a model is to be written as an encoder and a decoder with caches.

    That is an encoder-decoder of transformers that generates, unless the examples are more than its encoder's inputs;
    whether to use a cache is not the encoder's business.
    """
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    if not getattr(config, "is_encoder_decoder", False) or generates is None or not generates():
        return False
    if examples is None:
        return True
    read = inspect.signature(model.get_encoder().forward).parameters  # type: ignore[operator]
    return _keywords(model, examples).keys() <= read.keys() - {"use_cache"}


def traceable_halves(
    model: nn.Module, examples: Any, dynamic_axes: DynamicAxes | None
) -> tuple[Traceable, Traceable]:
    """Return a model's encoder and its decoder as the tracer takes them.

    Args:
        model: One that `has_halves`.
        examples: Inputs of the encoder, as `graphprune.trace` takes them; None for token ids and their mask.
        dynamic_axes: The free axes of these; None to find them by `guessed_axes`.

    Raises:
        ExportError: If the model does not take the examples, or keeps no plain keys and values of every token.
    """
    inputs = encoder_inputs(model, examples)
    tensors = dict(named_tensors(inputs))
    free = guessed_axes(tensors) if dynamic_axes is None else checked_axes(tensors, dynamic_axes)
    tensors = without_ones(tensors, free)
    inputs = with_tensors(inputs, list(tensors.values()))
    sizes = _sizes(model, inputs)
    encoder = Traceable(
        module=EncoderHalf(model, inputs),
        arguments=(list(tensors.values()),),
        dynamic_shapes=([dict.fromkeys(axes, Dim.AUTO) for axes in free.values()],),
        input_names=list(tensors),
        output_names=["last_hidden_state", *_names(sizes.cross, "present", "encoder")],
        name_axes=partial(name_symbols, free=free, required=dynamic_axes is not None),
        graph_name="encoder",
        remedy=_REMEDY,
    )
    return encoder, _traceable_decoder(model, sizes, tensors.get(MASK))


def encoder_inputs(model: nn.Module, examples: Any) -> dict[str, Any]:
    """Return the encoder's inputs as keyword arguments; of texts if there are no examples.

    Raises:
        ExportError: If the model does not take the examples, or has to be given some.
    """
    if examples is not None:
        return _keywords(model, examples)
    name = str(model.main_input_name)
    if name != "input_ids":
        raise ExportError(f"the encoder reads {name}, of unknown sizes", f"give examples={{'{name}': ...}}")
    masked = MASK in inspect.signature(model.forward).parameters
    ids = torch.zeros(_TEXT, dtype=torch.long)
    return {name: ids, MASK: torch.ones_like(ids)} if masked else {name: ids}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What one run of a model shows of its caches.

    Attributes:
        own: Layers of the decoder's attention to its own tokens.
        cross: Layers of its attention to what is encoded.
        states: (batch, sequence, width) of the encoder's last hidden state.
    """

    own: list[CacheLayer]
    cross: list[CacheLayer]
    states: tuple[int, ...]


class EncoderHalf(nn.Module):
    """Computes the encoder's last hidden state, then keys and values of the attention to it, layer by layer.

    Args:
        model: A transformers encoder-decoder that takes an `EncoderDecoderCache`.
        inputs: Keyword arguments of its encoder; what is no tensor in them is the same at every call.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the model on one token; what only that token needs is in no result, and so in no graph."""
        return encoded(self.model, with_tensors(self._inputs, tensors))


class DecoderHalf(nn.Module):
    """Computes `(logits, [present keys, present values of each layer])` from flat tensors.

    Args:
        model: A transformers encoder-decoder that takes an `EncoderDecoderCache`.
        sizes: Of its caches.
    """

    def __init__(self, model: nn.Module, sizes: Sizes) -> None:
        super().__init__()
        self.model = model
        self._sizes = sizes

    def forward(
        self, input_ids: Tensor, encoder_mask: Tensor | None, past: list[Tensor], cross: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one step.

        Args:
            input_ids: New tokens, int64 (batch, sequence).
            encoder_mask: int64 (batch, encoder's tokens), 0 for padding; None for an encoder that takes none.
            past: Key, value, key, value, ... of the tokens before, each (batch, heads, past, head size).
            cross: The same of what is encoded. They are given, so that nobody reads the encoder's states.
        """
        cache = EncoderDecoderCache(_filled(self._sizes.own, past), _filled(self._sizes.cross, cross))
        cache.is_updated = dict.fromkeys((layer.index for layer in self._sizes.cross), True)
        states = opaque(_STATES, (), (cross[0].shape[0], cross[0].shape[2], self._sizes.states[-1]))
        output = self.model(
            **({} if encoder_mask is None else {MASK: encoder_mask}),
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, _flat(output.past_key_values.self_attention_cache)


def encoded(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return what `EncoderHalf` computes."""
    output = _first_step(model, inputs)
    return [output.encoder_last_hidden_state, *_flat(output.past_key_values.cross_attention_cache)]


def _keywords(model: nn.Module, examples: Any) -> dict[str, Any]:
    try:
        return keyword_inputs(model, examples)
    except TraceError as error:
        raise ExportError(error.problem, error.remedy) from error


def _first_step(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on its encoder's inputs and one token, which is of no matter for what the encoder's caches hold."""
    batch = next(tensor for _, tensor in named_tensors(inputs)).shape[0]
    return model(
        **inputs,
        decoder_input_ids=torch.zeros(batch, 1, dtype=torch.long),
        past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
        use_cache=True,
    )


def _sizes(model: nn.Module, inputs: Mapping[str, Any]) -> Sizes:
    try:
        with torch.no_grad():
            output = _first_step(model, inputs)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"the model does not run on the examples: {reason}", "give others") from error
    cache, states = output.past_key_values, tuple(output.encoder_last_hidden_state.shape)
    sizes = Sizes(
        own=filled_layers(cache.self_attention_cache, tokens=1),
        cross=filled_layers(cache.cross_attention_cache, tokens=states[1]),
        states=states,
    )
    if not sizes.own or not sizes.cross:
        raise ExportError("the model filled no EncoderDecoderCache", "export models that take one")
    return sizes


def _traceable_decoder(model: nn.Module, sizes: Sizes, mask: Tensor | None) -> Traceable:
    masks = [] if mask is None else [ENCODER_MASK]
    batch, source = Dim(BATCH), Dim(ENCODED)
    return Traceable(
        module=DecoderHalf(model, sizes),
        arguments=_example_arguments(sizes, mask),
        dynamic_shapes=(
            # Not named dimensions: tables of positions bound their sum, which torch allows of free ones alone.
            {0: batch, 1: Dim.AUTO},
            None if mask is None else {0: batch, 1: Dim.AUTO},
            [{0: batch, 2: Dim.AUTO} for _ in range(2 * len(sizes.own))],
            [{0: batch, 2: source} for _ in range(2 * len(sizes.cross))],
        ),
        input_names=[
            "input_ids",
            *masks,
            *_names(sizes.own, "past_key_values", "decoder"),
            *_names(sizes.cross, "past_key_values", "encoder"),
        ],
        output_names=["logits", *_names(sizes.own, "present", "decoder")],
        name_axes=partial(_name_axes, sizes=sizes, masked=mask is not None),
        graph_name="decoder",
        remedy=_REMEDY,
    )


def _example_arguments(sizes: Sizes, mask: Tensor | None) -> tuple[Any, ...]:
    """Return small arguments with which `DecoderHalf` is traced; no two of their free sizes are equal."""
    batch, source = sizes.states[:2]
    taken = {batch, source, *(() if mask is None else mask.shape)}
    sequence, past = (
        size for size, _ in zip((n for n in count(3) if n not in taken), range(2), strict=False)
    )
    own, cross = (
        [
            torch.zeros(batch, heads, tokens, size)
            for layer in layers
            for heads, size in (layer.key, layer.value)
        ]
        for layers, tokens in ((sizes.own, past), (sizes.cross, source))
    )
    return torch.zeros(batch, sequence, dtype=torch.long), mask, own, cross


def _name_axes(graph: ir.Graph, sizes: Sizes, masked: bool) -> None:
    def cache(layers: Iterable[CacheLayer], tokens: str) -> list[tuple[int | str | None, ...]]:
        return [(BATCH, heads, tokens, size) for layer in layers for heads, size in (layer.key, layer.value)]

    past, cross = cache(sizes.own, PAST), cache(sizes.cross, ENCODED)
    masks: list[tuple[int | str | None, ...]] = []
    if masked:
        mask, keys = graph.inputs[1].shape, graph.inputs[2 + len(past)].shape
        same = mask is not None and keys is not None and mask[1] == keys[2]
        masks = [(BATCH, ENCODED if same else ENCODER_INPUT)]
    inputs = [(BATCH, SEQUENCE), *masks, *past, *cross]
    for value, names in zip(graph.inputs, inputs, strict=False):
        _check_free(value, names)
    name_dimensions(graph.inputs[: len(inputs)], inputs)
    name_dimensions(graph.outputs, [(BATCH, SEQUENCE, None), *cache(sizes.own, TOTAL)])


def _check_free(value: ir.Value, names: Iterable[int | str | None]) -> None:
    for size, name in zip(value.shape or (), names, strict=True):
        if isinstance(size, int) and isinstance(name, str):
            raise ExportError(
                f"the decoder takes one {name} only: {value.name} is {value.shape}",
                "export models that take any number of tokens after any number of others",
            )


def _names(layers: Iterable[CacheLayer], prefix: str, side: str) -> list[str]:
    return [f"{prefix}.{layer.index}.{side}.{part}" for layer in layers for part in ("key", "value")]


def _filled(layers: Iterable[CacheLayer], tensors: list[Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for layer, key, value in zip(layers, tensors[::2], tensors[1::2], strict=True):
        cache.update(key, value, layer.index)
    return cache


def _flat(cache: DynamicCache) -> list[Tensor]:
    """Return key, value, key, value, ... of the layers that hold any."""
    filled = (layer for layer in cache.layers if getattr(layer, "keys", None) is not None)
    return [tensor for layer in filled for tensor in (layer.keys, layer.values)]
