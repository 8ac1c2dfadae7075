"""Values computed from sizes alone."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule(
    "aten.zeros.default",
    "aten.ones.default",
    "aten.full.default",
    "aten.zeros_like.default",
    "aten.ones_like.default",
    "aten.full_like.default",
    "aten.new_zeros.default",
    "aten.new_ones.default",
    "aten.new_full.default",
    "aten.scalar_tensor.default",
)
def constant(operator: Operator, algebra: Algebra) -> Axes:
    """Fill a shape with one number: any layout will do."""
    (output,) = operator.outputs
    return algebra.fresh(output.shape if output else ())


@rule("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(operator: Operator, algebra: Algebra) -> Axes:
    """Count: the units have an order."""
    (output,) = operator.outputs
    axes = algebra.fresh(output.shape if output else ())
    for axis in axes:
        algebra.pin(axis, f"{operator.target} numbers its units")
    return axes
