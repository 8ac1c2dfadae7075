"""Fused attention and rotary position embedding, in ONNX and in com.microsoft."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.attention import attend
from graphprune.coupling.rules.registry import rule
from graphprune.errors import CouplingError
from graphprune.trace.graph import Operator, Value


@rule("onnx.Attention", vanishes="value")
def attention(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Attend, operands (batch, heads, length, width) or (batch, length, heads × width)."""
    heads, key_heads = operator["q_num_heads"], operator["kv_num_heads"]
    query = _by_heads(algebra, algebra[operator["Q"]], heads)
    key = _by_heads(algebra, algebra[operator["K"]], key_heads)
    value = _by_heads(algebra, algebra[operator["V"]], key_heads)
    past = (operator["past_key"], operator["past_value"])
    results = _attention(operator, algebra, (query, key, value), past, operator["attn_mask"])
    return results[: len(operator.outputs)]


@rule("com.microsoft.GroupQueryAttention", vanishes="value")
def group_query_attention(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Attend with grouped heads; query, key and value may be packed into one operand, and rotated here."""
    heads, key_heads = operator["num_heads"], operator["kv_num_heads"]
    packed = algebra[operator["query"]]
    if operator["key"] is None:
        width = packed[-1].size // (heads + 2 * key_heads)
        sizes = [count * width for count in (heads, key_heads, key_heads)]
        operands = [[*packed[:-1], part] for part in algebra.split(packed[-1], sizes)]
    else:
        operands = [packed, algebra[operator["key"]], algebra[operator["value"]]]
    query, key, value = (
        _by_heads(algebra, axes, count)
        for axes, count in zip(operands, (heads, key_heads, key_heads), strict=True)
    )
    if operator["do_rotary"]:
        for axes in (query, key):
            _rotate(operator, algebra, axes[-1], operator["cos_cache"], operator["sin_cache"])
    if operator["head_sink"] is not None:
        algebra.same(algebra[operator["head_sink"]][0], query[1])
    past = (operator["past_key"], operator["past_value"])
    bias = operator["attention_bias"]
    results = _attention(operator, algebra, (query, key, value), past, bias, has_room=True)
    return results[: len(operator.outputs)]


@rule("com.microsoft.MultiHeadAttention", vanishes="value")
def multi_head_attention(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Attend with as many key heads as query heads; operands apart, or packed (…, heads, 3, width)."""
    heads, source = operator["num_heads"], algebra[operator["query"]]
    if operator["key"] is None:
        if len(source) != 5:
            raise CouplingError(
                "MultiHeadAttention has no key", "give query, key and value, or pack them in 5 axes"
            )
        algebra.pin(source[3], "query, key and value by number")
        query = key = value = [source[0], source[2], source[1], source[4]]
    elif operator["value"] is None:
        packed = algebra[operator["key"]]
        algebra.pin(packed[3], "key and value by number")
        query = _by_heads(algebra, source, heads)
        key = value = [packed[0], packed[2], packed[1], packed[4]]
    else:
        operands = [algebra[operator[name]] for name in ("query", "key", "value")]
        if operator["bias"] is not None:
            widths = [axes[-1].size if len(axes) == 3 else axes[1].size * axes[3].size for axes in operands]
            biases = algebra.split(algebra[operator["bias"]][0], widths)
            for axes, bias in zip(operands, biases, strict=True):
                algebra.same(axes[-1] if len(axes) == 3 else algebra.solver.product([axes[1], axes[3]]), bias)
        query, key, value = (_by_heads(algebra, axes, heads) for axes in operands)
    past = (operator["past_key"], operator["past_value"])
    results = _attention(operator, algebra, (query, key, value), past, operator["attention_bias"])
    return results[: len(operator.outputs)]


@rule("com.microsoft.Attention")
def packed_attention(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Project by one fused weight (in, q + k + v), then attend."""
    source, weights, bias = operator["input"], operator["weights"], operator["bias"]
    if operator["do_rotary"]:
        raise CouplingError(
            "Attention rotates by angles of its own", "export rotary embedding as an operator"
        )
    algebra.contract(source, -1, weights, 0)
    projected = algebra.produce(weights, 1)
    if bias is not None:
        algebra.same(projected, algebra[bias][0])
    widths = operator["qkv_hidden_sizes"] or (projected.size // 3,) * 3
    query, key, value = (
        _by_heads(algebra, [*algebra[source][:-1], part], operator["num_heads"])
        for part in algebra.split(projected, widths)
    )
    result, key_cache, value_cache, _ = _attention(
        operator, algebra, (query, key, value), (None, None), operator["attention_bias"]
    )
    if len(operator.outputs) < 2 and operator["past"] is None:
        return (result,)
    algebra.same(key_cache[1], value_cache[1])
    algebra.same(key_cache[3], value_cache[3])
    pair = algebra.fresh([2])[0]
    algebra.pin(pair, "key and value by number")
    present = [pair, key_cache[0], key_cache[1], key_cache[2], key_cache[3]]
    if operator["past"] is not None:
        past = algebra[operator["past"]]
        algebra.pin(past[0], "key and value by number")
        for position in (2, 4):
            algebra.same(past[position], present[position])
    return (result, present)[: len(operator.outputs)]


@rule("onnx.RotaryEmbedding", "com.microsoft.RotaryEmbedding", vanishes="first")
def rotary_embedding(operator: Operator, algebra: Algebra) -> Axes:
    """Rotate pairs of a head's width; the input is (batch, heads, length, width) or (batch, length, heads × width)."""
    source: Value = operator["X"] or operator["input"]
    cos = operator["cos_cache"]
    axes = algebra[source]
    heads = operator["num_heads"]
    if len(axes) == 3 and not heads:
        heads = axes[-1].size // (2 * cos.shape[-1])
    width = _by_heads(algebra, axes, heads)[-1]
    _rotate(operator, algebra, width, cos, operator["sin_cache"])
    return list(axes)


def _rotate(operator: Operator, algebra: Algebra, width: Layout, cos: Value, sin: Value) -> None:
    """Pair the first half of a width with the second, or neighbours with each other; the rest is left alone."""
    interleaved = operator["interleaved"] or operator["rotary_interleaved"]
    for table in (cos, sin):
        pairs = algebra[table][-1]
        if 2 * pairs.size < width.size:
            rotated, _ = algebra.split(width, [2 * pairs.size, width.size - 2 * pairs.size])
        else:
            rotated = width
        if len(table.shape) == 2:
            algebra.pin(algebra[table][0], "a lookup reads its rows by number")
        if interleaved:
            two = algebra.fresh([2])[0]
            algebra.pin(two, "the two of a rotary pair have an order")
            algebra.same(algebra.solver.product([pairs, two]), rotated)
        else:
            algebra.same(algebra.concat([pairs, pairs]), rotated)


def _by_heads(algebra: Algebra, axes: Axes, heads: int | None) -> Axes:
    """Return axes as (batch, heads, length, width)."""
    if len(axes) == 4:
        return list(axes)
    if not heads:
        raise CouplingError("the number of heads is not given", "export it as an attribute")
    batch, length, whole = axes
    head, width = algebra.reshape([whole], [whole.size], [heads, whole.size // heads])
    return [batch, head, length, width]


def _attention(
    operator: Operator,
    algebra: Algebra,
    operands: tuple[Axes, Axes, Axes],
    past: tuple[Value | None, Value | None],
    mask: Value | None,
    *,
    has_room: bool = False,
) -> tuple[Axes, ...]:
    """Return the axes of the result, its heads merged again as the operator does, and of the caches.

    Where a cache may have room for more tokens than there are, the mask is of those that there are.
    """
    query, key, value = operands
    caches: list[Axes] = []
    for axes, cache in ((key, past[0]), (value, past[1])):
        length = axes[2]
        if cache is not None:
            before = algebra[cache]
            for position in (0, 1, 3):
                algebra.same(before[position], axes[position])
            length = algebra.fresh([cache.shape[2] + length.size])[0]
        caches.append([axes[0], axes[1], length, axes[3]])
    table = None if mask is None else list(algebra[mask])
    if mask is not None and table is not None and mask.shape[-1] not in (1, caches[0][2].size):
        if not has_room:
            raise CouplingError(
                f"the mask '{mask.name}' is shorter than the keys", "give one for all of them"
            )
        algebra.pin(table[-1], "tokens of a cache are counted")
        table[-1] = caches[0][2]
    contracted = (operator.inputs[0], operator["key"] or operator["K"] or operator.inputs[0])
    result = attend(algebra, (query, caches[0], caches[1]), contracted, mask=table, grouped=True)
    first = operator.outputs[0]
    if first is not None and len(first.shape) == 3:
        batch, head, length, width = result
        result = [batch, length, algebra.solver.product([head, width])]
    scores = [result[0], query[1], query[2], caches[0][2]]
    return result, caches[0], caches[1], scores
