"""Values computed from sizes alone."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator


@rule("aten.zeros", "aten.new_zeros", vanishes="zero")
@rule(
    "aten.ones",
    "aten.full",
    "aten.empty",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.scalar_tensor",
)
def constant(operator: Operator, algebra: Algebra) -> Axes:
    """Fill a shape with one number: any layout will do."""
    (output,) = operator.outputs
    return algebra.fresh(output.shape if output else ())


@rule("aten.zeros_like", vanishes="zero")
@rule("aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like", "aten.randn_like")
def alike(operator: Operator, algebra: Algebra) -> Axes:
    """Take the shape of another value: it shrinks with it."""
    return list(algebra[operator.inputs[0]])


@rule("aten.arange", "aten.eye", "aten.linspace", "aten.tril_indices", "aten.triu_indices")
def numbered(operator: Operator, algebra: Algebra) -> Axes:
    """Count: the units have an order. A reader computed from parameters may read a selection all the same."""
    (output,) = operator.outputs
    axes = algebra.fresh(output.shape if output else ())
    for axis in axes:
        algebra.pin(axis, f"{operator.target} numbers its units")
    return axes
