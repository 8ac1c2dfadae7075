"""Run the rules over an operator graph."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.layout import find
from graphprune.coupling.rules import moves_numbers, rule_for
from graphprune.coupling.vanishing import block_what_does_not_vanish
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
    algebra = Algebra(graph)
    for operator in graph.operators:
        algebra.enter(operator)
        algebra.leave(operator, _apply(operator, algebra), moves=moves_numbers(operator.target))
    for value in graph.outputs:
        if value.name in graph.state_names:
            continue
        for position, axis in enumerate(algebra[value]):
            algebra.pin(axis, f"reaches the model's output '{value.name}' axis {position}")
    algebra.settle()
    block_what_does_not_vanish(graph, algebra)
    return algebra


def _apply(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Apply an operator's rule; without one, or where it does not fit, the operator is opaque."""
    rule = rule_for(operator.target)
    if rule is None:
        return algebra.opaque(operator, "has no rule")
    try:
        result = rule(operator, algebra)
    except (CouplingError, LookupError, TypeError, ValueError, AttributeError) as error:
        return algebra.opaque(operator, f"is used in a way that its rule does not cover ({error!r})")
    outputs = result if isinstance(result, tuple) else (result,)
    if len(outputs) != len(operator.outputs):
        return algebra.opaque(
            operator, f"gets {len(outputs)} results from its rule, not {len(operator.outputs)}"
        )
    for value, axes in zip(operator.outputs, outputs, strict=True):
        if value is not None and tuple(find(axis).size for axis in axes) != value.shape:
            sizes = tuple(find(axis).size for axis in axes)
            return algebra.opaque(operator, f"gets the shape {sizes} from its rule, not {value.shape}")
    return outputs
