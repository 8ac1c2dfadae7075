"""Attention as ONNX Runtime's GroupQueryAttention, which writes new keys and values into the cache where it lies.

ONNX's Attention returns the whole cache anew, which is copied at each token. GroupQueryAttention can be given one
buffer as the cache before and after, as long as the longest text: then the size of the cache does not tell how many
tokens came before, and the sizes of `attention_mask` and `input_ids` do. What the model masks is added to its scores as
it is, padding on the left included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import MICROSOFT, GraphWriter
from graphprune.trace.graph import Operator

Cache = Literal["growing", "shared"]

_ATTENTION = "aten.scaled_dot_product_attention.default"
_KEPT = "scale", "softcap"
_MULTIPLE = 8
"""Head sizes that the operator computes with are multiples of it."""
_NEVER = float(np.finfo(np.float32).min) / 2
"""Added to the score of what is masked: finite, so that a row of nothing else has a softmax."""
_REMEDY = "export it with a cache that grows (cache='growing', recipe: export.cache)"


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Numbers of tokens.

    Attributes:
        batch: int64 (1,).
        past: int64 (1,).
        total: int32, of past and new ones.
        last: int32 (batch,), `total` less one for each text.
    """

    batch: ir.Value
    past: ir.Value
    total: ir.Value
    last: ir.Value


def check_cache(cache: str, profile: str, *, decoder: bool) -> None:
    """Raise ExportError unless a model can be written with such a cache."""
    if cache not in get_args(Cache):
        raise ExportError(f"there is no cache {cache!r}", f"use one of {', '.join(get_args(Cache))}")
    if cache == "shared" and profile == "portable":
        raise ExportError(
            "a shared cache wants ONNX Runtime's own operator, and profile portable has none of these",
            _REMEDY,
        )
    if cache == "shared" and not decoder:
        raise ExportError("a shared cache is of causal language models, exported without examples", _REMEDY)


def check_attention(operators: Iterable[Operator]) -> None:
    """Tell of a traced module, before anything long is done with it, that it cannot be written so.

    Raises:
        ExportError: If attention is no operator of its own, or has heads of a size that cannot be.
    """
    queries = [operator["query"] for operator in operators if operator.target == _ATTENTION]
    if not queries:
        raise ExportError("attention is not one operator in this model, and cannot share its cache", _REMEDY)
    for query in queries:
        _check_size(query.name, query.shape[-1])


def has_shared_cache(graph: ir.Graph) -> bool:
    """Return whether a decoder's cache may be one buffer before and after."""
    return any(node.op_type == "GroupQueryAttention" for node in graph)


def share_cache(graph: ir.Graph, inputs: Mapping[str, ir.Value]) -> None:
    """Let every Attention be a GroupQueryAttention, while shapes are known.

    Args:
        graph: A decoder's, its Attention fused with the cache.
        inputs: Its inputs by the names that they will have.

    Raises:
        ExportError: If a layer's attention is not what the operator computes, or something else reads its cache.
    """
    caches = {name: value for name, value in inputs.items() if name.startswith("past_key_values.")}
    writer = GraphWriter(graph)
    sizes = _sizes(graph, writer, inputs)
    for cache in caches.values():
        _read_sizes_elsewhere(cache, sizes)
    added: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "Attention" and node.domain == ""]:
        if len(node.inputs) > 4 and node.inputs[4] in caches.values():
            _replace(graph, writer, node, sizes, added)
    for name, cache in caches.items():
        readers = {use.node.op_type for use in cache.uses()}
        if readers != {"GroupQueryAttention"}:
            raise ExportError(
                f"{name} is read by {', '.join(sorted(readers)) or 'nothing'}, and cannot be shared", _REMEDY
            )


def _sizes(graph: ir.Graph, writer: GraphWriter, inputs: Mapping[str, ir.Value]) -> _Sizes:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    writer.begin("shared_cache")
    batch = writer.node("Shape", [ids], start=0, end=1)
    new = writer.node("Shape", [ids], start=1, end=2)
    whole = writer.node("Shape", [mask], start=1, end=2)
    past = writer.node("Sub", [whole, new])
    count = writer.node("Cast", [whole], to=ir.DataType.INT32.value)
    one = writer.initializer("shared_cache.one", lambda: np.array([1], np.int32))
    last = writer.node("Expand", [writer.node("Sub", [count, one]), batch])
    total = writer.node("Squeeze", [count])
    writer.insert_before(next(iter(graph)))
    return _Sizes(batch, past, total, last)


def _read_sizes_elsewhere(cache: ir.Value, sizes: _Sizes) -> None:
    """Let what asks for a cache's batch or tokens ask the ids and the mask."""
    for use in list(cache.uses()):
        if use.node.op_type != "Shape":
            continue
        start, end = (use.node.attributes[name].as_int() for name in ("start", "end"))
        instead = {(0, 1): sizes.batch, (2, 3): sizes.past}.get((start, end))
        if instead is not None:
            use.node.outputs[0].replace_all_uses_with(instead)
            owner = use.node.graph
            if owner is not None:
                owner.remove(use.node, safe=True)


def _replace(
    graph: ir.Graph, writer: GraphWriter, node: ir.Node, sizes: _Sizes, added: dict[ir.Value, ir.Value]
) -> None:
    label = node.name or "attention"
    layout = _layout(node, label)
    mask = node.inputs[3]
    if mask is None or mask.shape is None or len(mask.shape) != 4:
        raise ExportError(f"{label} has no mask (batch, heads, tokens, all tokens) to be added", _REMEDY)
    writer.begin(f"{label}/shared")
    if mask not in added:
        added[mask] = _as_bias(writer, mask)
    read = [
        _flat(writer, value, heads * layout.size) if layout.heads_first else value
        for value, heads in zip(node.inputs[:3], layout.heads, strict=True)
    ]
    writer.insert_before(node)
    fused = ir.node(
        "GroupQueryAttention",
        [*read, *node.inputs[4:6], sizes.last, sizes.total, None, None, None, added[mask]],
        {
            "num_heads": layout.heads[0],
            "kv_num_heads": layout.heads[1],
            **{name: node.attributes[name].as_float() for name in _KEPT if name in node.attributes},
        },
        domain=MICROSOFT,
        num_outputs=3,
        name=label,
    )
    writer.begin(f"{label}/heads")
    result = _heads_first(writer, fused.outputs[0], layout) if layout.heads_first else fused.outputs[0]
    ir.convenience.replace_nodes_and_values(
        graph,
        insertion_point=node,
        old_nodes=[node],
        new_nodes=[fused, *writer.nodes],
        old_values=node.outputs,
        new_values=[result, *fused.outputs[1:]],
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """How an Attention lays out what it reads.

    Attributes:
        heads: Of query, key and value.
        size: Of a head.
        heads_first: Whether that is (batch, heads, tokens, size), not (batch, tokens, heads x size).
    """

    heads: tuple[int, int, int]
    size: int
    heads_first: bool


def _layout(node: ir.Node, label: str) -> _Layout:
    """Return the layout of an Attention that the operator can compute."""
    flat = "q_num_heads" in node.attributes
    key, value = (_heads_and_size(cache) for cache in node.inputs[4:6])
    heads = node.attributes["q_num_heads"].as_int() if flat else _heads_and_size(node.inputs[0])[0]
    if key != value or 0 in (heads, *key) or heads % key[0]:
        raise ExportError(
            f"{label} has {heads} heads, keys {key[0]} of {key[1]}, values {value[0]} of {value[1]}", _REMEDY
        )
    key_heads, size = key
    _check_size(label, size)
    return _Layout((heads, key_heads, key_heads), size, not flat)


def _check_size(label: str, size: int) -> None:
    if size % _MULTIPLE:
        raise ExportError(
            f"{label} has heads of {size}, and a shared cache wants a multiple of {_MULTIPLE}", _REMEDY
        )


def _heads_and_size(value: ir.Value | None) -> tuple[int, int]:
    """Return heads and their size of (batch, heads, tokens, size), 0 for what is not known."""
    shape = None if value is None else value.shape
    if shape is None or len(shape) != 4:
        return 0, 0
    heads, size = shape[1], shape[3]
    return heads if isinstance(heads, int) else 0, size if isinstance(size, int) else 0


def _flat(writer: GraphWriter, value: ir.Value | None, width: int) -> ir.Value:
    """Return (batch, heads, tokens, size) as (batch, tokens, heads x size)."""
    turned = writer.node("Transpose", [value], perm=[0, 2, 1, 3])
    return writer.node("Reshape", [turned, writer.integers(0, 0, width)])


def _heads_first(writer: GraphWriter, value: ir.Value, layout: _Layout) -> ir.Value:
    """Return (batch, tokens, heads x size) as (batch, heads, tokens, size)."""
    split = writer.node("Reshape", [value, writer.integers(0, 0, layout.heads[0], layout.size)])
    return writer.node("Transpose", [split], perm=[0, 2, 1, 3])


def _as_bias(writer: GraphWriter, mask: ir.Value) -> ir.Value:
    """Return what is added to scores: a mask of numbers as it is, of truths 0 where it holds."""
    if mask.dtype != ir.DataType.BOOL:
        return mask
    seen = writer.initializer("shared_cache.seen", lambda: np.array(0, np.float32))
    never = writer.initializer("shared_cache.never", lambda: np.array(_NEVER, np.float32))
    return writer.node("Where", [mask, seen, never])
