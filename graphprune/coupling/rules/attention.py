"""Fused attention."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.scaled_dot_product_attention", vanishes="value")
def scaled_dot_product_attention(operator: Operator, algebra: Algebra) -> Axes:
    """Return softmax(q kᵀ · scale + mask) v, each (…, heads, length, width).

    With ``enable_gqa`` a key head serves consecutive query heads: query heads = key heads × repetition.
    """
    query, key, value = operator["query"], operator["key"], operator["value"]
    mask = operator["attn_mask"]
    q, k, v = algebra[query], algebra[key], algebra[value]
    shape = operator.outputs[0].shape  # type: ignore[union-attr]
    shared = tuple(max(sizes) for sizes in zip(key.shape[:-2], value.shape[:-2], strict=True))
    batch = algebra.align([(k[:-2], key.shape[:-2]), (v[:-2], value.shape[:-2])], shared)
    algebra.mark(q[:-2], "heads")
    if operator["enable_gqa"] and query.shape[-3] != key.shape[-3]:
        repetition = algebra.fresh([query.shape[-3] // key.shape[-3]])[0]
        algebra.mark([repetition], "repeated")
        batch = [*batch[:-1], algebra.solver.product([batch[-1], repetition])]
        shared = (*shared[:-1], query.shape[-3])
    batch = algebra.align([(q[:-2], query.shape[:-2]), (batch, shared)], shape[:-2])
    algebra.contract(query, -1, key, -1)
    algebra.same(k[-2], v[-2])
    algebra.mark([q[-1], v[-1]], "head_dim")
    if mask is not None:
        sizes = (*shape[:-1], key.shape[-2])
        algebra.align([([*batch, q[-2], k[-2]], sizes), (algebra[mask], mask.shape)], sizes)
    return [*batch, q[-2], v[-1]]
