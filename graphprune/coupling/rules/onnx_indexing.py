"""Operators of ONNX that read and write by index."""

from __future__ import annotations

from dataclasses import replace

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules import indexing, reshaping, routing
from graphprune.coupling.rules.normalisation import layer_norm
from graphprune.coupling.rules.onnx_reshaping import asking, numbers
from graphprune.coupling.rules.registry import rule
from graphprune.errors import CouplingError
from graphprune.trace.graph import Argument, Operator


@rule("onnx.Gather", vanishes="first")
def gather(operator: Operator, algebra: Algebra) -> Axes:
    """Read entries of one axis by number."""
    source, indices, dim = operator["data"], operator["indices"], operator["axis"]
    if indices.content is not None and indices.content.ndim == 0:
        call = asking(operator, self=source, dim=dim, index=int(indices.content))
        return reshaping.pick(call, algebra)[0]
    if source.is_weight and dim == 0 and len(source.shape) == 2:
        return indexing.embedding(asking(operator, weight=source, indices=indices), algebra)
    return indexing.index_select(asking(operator, self=source, dim=dim, index=indices), algebra)


@rule("onnx.GatherND", vanishes="first")
def gather_rows(operator: Operator, algebra: Algebra) -> Axes:
    """Read rows by numbers that stand in an axis of their own."""
    source, indices = operator["data"], operator["indices"]
    if indices.shape[-1] != 1 or operator["batch_dims"]:
        raise CouplingError("GatherND reads several axes at once", "give it a rule of your own")
    axes = indexing.index_select(asking(operator, self=source, dim=0, index=indices), algebra)
    place = len(indices.shape) - 1
    return [*axes[:place], *axes[place + 1 :]]


@rule("onnx.GatherElements", vanishes="first")
def gather_elements(operator: Operator, algebra: Algebra) -> Axes:
    """Read one index along an axis for each place of the result."""
    call = asking(operator, self=operator["data"], dim=operator["axis"], index=operator["indices"])
    return indexing.gather(call, algebra)


@rule("onnx.ScatterElements")
def scatter_elements(operator: Operator, algebra: Algebra) -> Axes:
    """Write one index along an axis for each place of what is written."""
    call = asking(
        operator,
        self=operator["data"],
        dim=operator["axis"],
        index=operator["indices"],
        src=operator["updates"],
    )
    return indexing.scatter(call, algebra)


@rule("onnx.TopK")
def top_k(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Choose units, or sort all of them."""
    source, dim = operator["X"], operator["axis"]
    (count,) = numbers(operator["K"]) or (0,)
    if count == source.shape[dim]:
        axes = routing.sort(_asking_all(operator, self=source, dim=dim), algebra)
    else:
        axes = routing.topk(_asking_all(operator, self=source, dim=dim, k=count), algebra)
    return axes if isinstance(axes, tuple) else (axes,)


def _asking_all(operator: Operator, **arguments: Argument) -> Operator:
    return replace(operator, arguments=arguments)


@rule("com.microsoft.EmbedLayerNormalization")
def embed_layer_normalization(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Add up to three embeddings, then centre and scale."""
    ids, words = operator["input_ids"], operator["word_embedding"]
    result = indexing.embedding(asking(operator, weight=words, indices=ids), algebra)
    for table in (operator["position_embedding"], operator["segment_embedding"]):
        if table is not None:
            algebra.mark(algebra[table][:1], "lookup")
            algebra.pin(algebra[table][0], "a lookup reads its rows by number")
            algebra.same(result[-1], algebra.produce(table, 1))
    call = asking(
        operator,
        input=words,
        weight=operator["gamma"],
        bias=operator["beta"],
        normalized_shape=words.shape[-1:],
    )
    layer_norm(call, algebra)
    return (result, [result[0]], result)[: len(operator.outputs)]
