"""Run the rules over an operator graph."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules import rule_for
from graphprune.errors import CouplingError
from graphprune.trace.graph import Operator, OperatorGraph


def analyze(graph: OperatorGraph) -> Algebra:
    """Give every axis of every value in `graph` its layout.

    Time and memory grow with the number of operators and axes, not with sizes.

    Args:
        graph: The operator graph.

    Returns:
        The algebra, which knows the layouts and why they are equal.
    """
    algebra = Algebra()
    for operator in graph.operators:
        algebra.enter(operator)
        outputs = _apply(operator, algebra)
        for value, axes in zip(operator.outputs, outputs, strict=True):
            if value is not None:
                algebra[value] = axes
    for place, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            for position, axis in enumerate(algebra[value]):
                algebra.pin(axis, f"reaches the model's {place} '{value.name}' axis {position}")
    algebra.settle()
    return algebra


def _apply(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    rule = rule_for(operator.target)
    if rule is None:
        return algebra.opaque(operator)
    result = rule(operator, algebra)
    outputs = result if isinstance(result, tuple) else (result,)
    for value, axes in zip(operator.outputs, outputs, strict=True):
        if value is not None and tuple(algebra.solver.find(axis).size for axis in axes) != value.shape:
            raise CouplingError(
                f"the rule of {operator.target} gives {operator.name} the shape "
                f"{tuple(axis.size for axis in axes)}, but the graph says {value.shape}",
                "mend the rule: it must return one layout for each axis of each output",
            )
    return outputs
