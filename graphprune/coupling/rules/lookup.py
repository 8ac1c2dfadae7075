"""Tables that are read by index."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.embedding.default")
def embedding(operator: Operator, algebra: Algebra) -> Axes:
    """Read rows of a table by index."""
    weight, indices = operator["weight"], operator["indices"]
    rows = algebra[weight][0]
    algebra.mark([rows], "lookup")
    algebra.pin(rows, "a lookup reads its rows by number")
    return [*algebra[indices], algebra.produce(weight, 1)]
