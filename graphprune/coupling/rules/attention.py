"""Fused attention."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator, Value


@rule("aten.scaled_dot_product_attention", vanishes="value")
def scaled_dot_product_attention(operator: Operator, algebra: Algebra) -> Axes:
    """Return softmax(q kᵀ · scale + mask) v, each (…, heads, length, width).

    With ``enable_gqa`` a key head serves consecutive query heads: query heads = key heads × repetition.
    """
    query, key, value, mask = (operator[name] for name in ("query", "key", "value", "attn_mask"))
    return attend(
        algebra,
        (algebra[query], algebra[key], algebra[value]),
        (query, key),
        mask=algebra[mask] if mask is not None else None,
        grouped=bool(operator["enable_gqa"]),
    )


def attend(
    algebra: Algebra,
    operands: tuple[Axes, Axes, Axes],
    contracted: tuple[Value, Value],
    *,
    mask: Axes | None,
    grouped: bool,
) -> Axes:
    """Return the axes of attention's result.

    Args:
        algebra: What holds the layouts.
        operands: Query, key and value, each (…, heads, length, width).
        contracted: The values that hold query and key.
        mask: What is added to the scores, or selects among them.
        grouped: Whether a key head serves consecutive query heads: query heads = key heads × repetition.
    """
    query, key, value = operands
    shared = [max(pair) for pair in zip(_sizes(key[:-2]), _sizes(value[:-2]), strict=True)]
    batch = algebra.align([(axes[:-2], _sizes(axes[:-2])) for axes in (key, value)], shared)
    algebra.mark(query[:-2], "heads")
    if grouped and query[-3].size != key[-3].size:
        repetition = algebra.fresh([query[-3].size // key[-3].size])[0]
        algebra.mark([repetition], "repeated")
        batch = [*batch[:-1], algebra.solver.product([batch[-1], repetition])]
    sizes = _sizes(query[:-2])
    batch = algebra.align(
        [(query[:-2], sizes), (batch, _sizes(batch))],
        [max(pair) for pair in zip(sizes, _sizes(batch), strict=True)],
    )
    algebra.same(query[-1], key[-1])
    algebra.sum_over([(contracted[0], query[-1]), (contracted[1], key[-1])])
    algebra.same(key[-2], value[-2])
    algebra.mark([query[-1], value[-1]], "head_dim")
    if mask is not None:
        scores = [*batch, query[-2], key[-2]]
        algebra.align([(scores, _sizes(scores)), (mask, _sizes(mask))], _sizes(scores))
    return [*batch, query[-2], value[-1]]


def _sizes(axes: Axes) -> list[int]:
    return [axis.size for axis in axes]
