"""Choosing among units: top-k routing, and the bookkeeping that sends rows to the units chosen for them.

The numbers that top-k returns name units of the axis that it chose from. Renumbered units renumber them, so that
whatever is read by them (a bias for each expert, counts, row boundaries) is coupled with the axis and not pinned.
A unit that is removed cannot be chosen: its score counts as minus infinity. Where the values alone are read (the
threshold of k winners), no unit is chosen, and another value would take the place of one that is gone.
"""

from __future__ import annotations

import math

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.topk")
def topk(operator: Operator, algebra: Algebra) -> tuple[Axes, Axes]:
    """Choose the k best units along an axis."""
    source, count = operator["self"], operator["k"]
    axes = list(algebra[source])
    dim = operator["dim"] % len(axes)
    chosen_from = axes[dim]
    algebra.mark([chosen_from], "routed" if algebra.is_read(operator.outputs[1]) else "ranked")
    factors = [factor for factor in algebra.solver.factors(chosen_from) if factor.size > 1]
    for factor in factors:
        others = math.prod(other.minimum for other in factors if other is not factor)
        factor.minimum = max(factor.minimum, math.ceil(count / others))
    axes[dim] = algebra.ordered(count, operator.target)
    algebra.name(operator.outputs[1], "units", chosen_from)
    return axes, list(axes)


@rule("aten.sort", "aten.argsort", "aten.msort")
def sort(operator: Operator, algebra: Algebra) -> Axes | tuple[Axes, ...]:
    """Sort along an axis; sorted names are names still."""
    source = operator["self"]
    axes = list(algebra[source])
    usual = 0 if operator.target == "aten.msort.default" else -1
    dim = (usual if operator["dim"] is None else operator["dim"]) % len(axes)
    algebra.pin(axes[dim], f"{operator.target} reorders its units")
    named = algebra.understand(source)
    if len(operator.outputs) == 1:
        return axes
    algebra.name(operator.outputs[0], "units", named)
    return axes, list(axes)


@rule("aten.histc", "aten.bincount")
def count(operator: Operator, algebra: Algebra) -> Axes:
    """Count how often each unit is named."""
    source, (output,) = operator.inputs[0], operator.outputs
    size = output.shape[0] if output else 0
    named = algebra.understand(source)
    spans = operator["bins"] is None or (operator["min"] == 0 and operator["max"] == size - 1)
    if named is None or named.size != size or not spans:
        if named is not None:
            algebra.pin(named, f"{operator.target} counts its units by number")
        return [algebra.ordered(size, operator.target)]
    algebra.name(output, "counts", named)
    return [named]
