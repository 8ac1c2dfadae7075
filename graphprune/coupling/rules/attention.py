"""Fused attention."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.scaled_dot_product_attention.default")
def scaled_dot_product_attention(operator: Operator, algebra: Algebra) -> Axes:
    """Return softmax(q kᵀ · scale + mask) v, each (…, heads, length, width).

    With ``enable_gqa`` a key head serves consecutive query heads: query heads = key heads × repetition.
    """
    query, key, value = operator["query"], operator["key"], operator["value"]
    mask = operator["attn_mask"]
    q, k, v = algebra[query], algebra[key], algebra[value]
    batch = algebra.align([(k[:-2], key.shape[:-2]), (v[:-2], value.shape[:-2])], key.shape[:-2])
    algebra.mark(q[:-2], "heads")
    if operator["enable_gqa"] and query.shape[-3] != key.shape[-3]:
        repetition = algebra.fresh([query.shape[-3] // key.shape[-3]])[0]
        algebra.mark([repetition], "repeated")
        batch = [*batch[:-1], algebra.solver.product([batch[-1], repetition])]
    batch = algebra.align([(q[:-2], query.shape[:-2]), (batch, query.shape[:-2])], query.shape[:-2])
    algebra.same(q[-1], k[-1])
    algebra.same(k[-2], v[-2])
    algebra.mark([q[-1], v[-1]], "head_dim")
    if mask is not None:
        scores = [*batch, q[-2], k[-2]]
        algebra.align(
            [(scores, (*query.shape[:-1], key.shape[-2])), (algebra[mask], mask.shape)],
            (*query.shape[:-1], key.shape[-2]),
        )
    return [*batch, q[-2], v[-1]]
