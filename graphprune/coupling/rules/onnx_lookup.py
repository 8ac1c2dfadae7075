"""Operators of ONNX that read by index."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.lookup import embedding
from graphprune.coupling.rules.onnx_reshaping import asking
from graphprune.coupling.rules.reduction import layer_norm
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator, Value


@rule("onnx.Gather")
def gather(operator: Operator, algebra: Algebra) -> Axes:
    """Read entries of one axis by number; consecutive ones are a segment, a weight's are a table's rows."""
    source, indices = operator["data"], operator["indices"]
    dim = operator["axis"] % len(source.shape)
    if algebra.is_weight(source) and indices.content is None and dim == 0 and len(source.shape) == 2:
        return embedding(asking(operator, weight=source, indices=indices), algebra)
    axes = algebra[source]
    inner = _segment(algebra, axes, dim, indices)
    if inner is None:
        algebra.pin(axes[dim], f"{operator.target} reads its indices by number")
        inner = list(algebra[indices])
        if indices.content is not None:
            for axis in inner:
                algebra.pin(axis, f"{operator.target} reads its indices by number")
    return [*axes[:dim], *inner, *axes[dim + 1 :]]


def _segment(algebra: Algebra, axes: Axes, dim: int, indices: Value) -> Axes | None:
    """Return the axis of consecutive indices, or None if they are not."""
    if indices.content is None or indices.content.ndim != 1 or not indices.content.size:
        return None
    size = axes[dim].size
    first, *rest = (int(index) % size for index in indices.content)
    if rest != list(range(first + 1, first + 1 + len(rest))):
        return None
    count = 1 + len(rest)
    pieces = [first, count, size - first - count]
    return [algebra.split(axes[dim], pieces)[1] if count != size else axes[dim]]


@rule("com.microsoft.EmbedLayerNormalization")
def embed_layer_normalization(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Add up to three embeddings, then centre and scale."""
    ids, words = operator["input_ids"], operator["word_embedding"]
    result = embedding(asking(operator, weight=words, indices=ids), algebra)
    for table in (operator["position_embedding"], operator["segment_embedding"]):
        if table is not None:
            rows, width = algebra[table][0], algebra.produce(table, 1)
            algebra.mark([rows], "lookup")
            algebra.pin(rows, "a lookup reads its rows by number")
            algebra.same(result[-1], width)
    call = asking(
        operator,
        input=words,
        weight=operator["gamma"],
        bias=operator["beta"],
        normalized_shape=words.shape[-1:],
    )
    layer_norm(call, algebra)
    others = ([result[0]], result)
    return (result, *(others[i] for i in range(len(operator.outputs) - 1)))
