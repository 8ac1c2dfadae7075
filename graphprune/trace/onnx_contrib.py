"""What onnx itself does not know of the com.microsoft operators: their formal parameters and result shapes.

Source: ContribOperators.md of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Shape: TypeAlias = "tuple[int, ...]"
Operands: TypeAlias = "Sequence[Shape | None]"
ShapeRule = Callable[[Operands, Mapping[str, Any]], "list[Shape]"]


@dataclass(frozen=True, slots=True)
class ContribSchema:
    """An operator of onnxruntime's own.

    Attributes:
        inputs: Names of its formal parameters.
        outputs: Names of its results.
        shapes: Result shapes from operand shapes (None where an optional operand is missing) and attributes.
        typed_like: Which operand the results take their element type from.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: ShapeRule
    typed_like: int = 0


def _like_first(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    return [_given(operands[0])]


def _skip_norm(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    source = _given(operands[0])
    statistics = (*source[:-1], 1)
    return [source, statistics, statistics, source]


def _quantized_matmul(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    return [(*_given(operands[0])[:-1], int(attributes["N"]))]


def _quantized_gather(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    data, indices = list(_given(operands[0])), _given(operands[1])
    if attributes.get("packed"):
        data[-1] = data[-1] * 8 // int(attributes.get("bits", 4))
    axis = int(attributes.get("gather_axis", 0))
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _fused_matmul(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    first, second = list(_given(operands[0])), list(_given(operands[1]))
    for shape, flag in ((first, "transA"), (second, "transB")):
        if attributes.get(flag):
            shape[-2:] = shape[:-3:-1]
    batch = first[:-2] if len(first) >= len(second) else second[:-2]
    return [(*batch, first[-2], second[-1])]


def _grouped_query_attention(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    batch, length, width = _given(operands[0])
    heads, key_heads = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    packed = operands[1] is None
    head_dim = width // (heads + 2 * key_heads) if packed else width // heads
    past = _at(operands, 3)
    total = length + (past[2] if past else 0)
    cache = (batch, key_heads, total, head_dim)
    return [(batch, length, heads * head_dim), cache, cache]


def _multi_head_attention(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    query, key, value = _given(operands[0]), _at(operands, 1), _at(operands, 2)
    heads = int(attributes["num_heads"])
    past = _at(operands, 6)
    before = past[2] if past else 0
    if len(query) == 5:  # packed (batch, length, heads, 3, head_dim)
        batch, length, _, _, head_dim = query
        cache = (batch, heads, before + length, head_dim)
        return [(batch, length, heads * head_dim), cache, cache]
    batch, length, width = query
    key = key or query
    head_dim = width // heads
    source = key[2] if len(key) == 4 else key[1]
    value_dim = head_dim if value is None else value[-1] if len(value) == 4 else value[-1] // heads
    total = before + source
    present = (batch, heads, total, head_dim), (batch, heads, total, value_dim)
    return [(batch, length, heads * value_dim), *present]


def _attention(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    source, bias, past = _given(operands[0]), _given(operands[1]), _at(operands, 4)
    widths = attributes.get("qkv_hidden_sizes") or [bias[1] // 3] * 3
    heads = int(attributes["num_heads"])
    total = source[1] + (past[3] if past else 0)
    return [(*source[:2], int(widths[2])), (2, source[0], heads, total, int(widths[1]) // heads)]


def _embedding_norm(operands: Operands, attributes: Mapping[str, Any]) -> list[Shape]:
    ids, table = _given(operands[0]), _given(operands[2])
    whole = (*ids, table[1])
    return [whole, ids[:1], whole]


def _given(shape: Shape | None) -> Shape:
    if shape is None:
        raise ValueError("an operand that the operator needs is missing")
    return shape


def _at(operands: Operands, position: int) -> Shape | None:
    return operands[position] if position < len(operands) else None


_NORM_OUTPUTS = ("output", "mean", "inv_std_var", "input_skip_bias_sum")
_BLOCKWISE = ("A", "B", "scales", "zero_points", "g_idx", "bias")

SCHEMAS: Mapping[str, ContribSchema] = {
    "MatMulNBits": ContribSchema(_BLOCKWISE, ("Y",), _quantized_matmul),
    "MatMulBnb4": ContribSchema(("A", "B", "absmax"), ("Y",), _quantized_matmul),
    "GatherBlockQuantized": ContribSchema(
        ("data", "indices", "scales", "zero_points"), ("output",), _quantized_gather, typed_like=2
    ),
    "FusedMatMul": ContribSchema(("A", "B"), ("Y",), _fused_matmul),
    "GroupQueryAttention": ContribSchema(
        (
            *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"),
            *("cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink"),
        ),
        ("output", "present_key", "present_value"),
        _grouped_query_attention,
    ),
    "MultiHeadAttention": ContribSchema(
        (
            *("query", "key", "value", "bias", "key_padding_mask", "attention_bias"),
            *("past_key", "past_value", "past_sequence_length", "cache_indirection"),
        ),
        ("output", "present_key", "present_value"),
        _multi_head_attention,
    ),
    "Attention": ContribSchema(
        ("input", "weights", "bias", "mask_index", "past", "attention_bias", "past_sequence_length"),
        ("output", "present"),
        _attention,
    ),
    "RotaryEmbedding": ContribSchema(
        ("input", "position_ids", "cos_cache", "sin_cache"), ("output",), _like_first
    ),
    "SimplifiedLayerNormalization": ContribSchema(("X", "scale"), ("Y",), _like_first),
    "SkipSimplifiedLayerNormalization": ContribSchema(
        ("input", "skip", "gamma", "bias"), _NORM_OUTPUTS, _skip_norm
    ),
    "SkipLayerNormalization": ContribSchema(
        ("input", "skip", "gamma", "beta", "bias"), _NORM_OUTPUTS, _skip_norm
    ),
    "EmbedLayerNormalization": ContribSchema(
        (
            *("input_ids", "segment_ids", "word_embedding", "position_embedding", "segment_embedding"),
            *("gamma", "beta", "mask", "position_ids"),
        ),
        ("output", "mask_index", "embedding_sum"),
        _embedding_norm,
        typed_like=2,
    ),
    "QuickGelu": ContribSchema(("X",), ("Y",), _like_first),
    "FastGelu": ContribSchema(("X", "bias"), ("Y",), _like_first),
    "Gelu": ContribSchema(("X",), ("Y",), _like_first),
    "BiasGelu": ContribSchema(("A", "B"), ("C",), _like_first),
}
