"""Sums over units: removing a unit equals zeroing it only where its terms are zero once its parameters are.

A linear layer's outputs are zero along a unit whose rows and bias are; after an exponential they are one. So a mean of
squares may lose a unit, and a softmax written as a quotient of sums may not.
"""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra
from graphprune.coupling.layout import atoms_of
from graphprune.coupling.rules import vanishing_of
from graphprune.trace.graph import Operator, OperatorGraph, Value

Atoms = frozenset[int]

# The operand that a product adds at last, where it is not called bias.
_ADDED = {
    "aten.addmm.default": "self",
    "aten.baddbmm.default": "self",
    "onnx.Gemm": "C",
    "onnx.Conv": "B",
    "onnx.ConvTranspose": "B",
}


def block_what_does_not_vanish(graph: OperatorGraph, algebra: Algebra) -> None:
    """Block the removal of units that some operator sums over although they are not zero when zeroed.

    Args:
        graph: The operator graph.
        algebra: Its layouts, settled.
    """
    zero = _zero_units(graph, algebra)
    targets = {operator.name: operator.target for operator in graph.operators}
    for name, operands in algebra.sums:
        known = frozenset().union(*(zero.get(value.name, frozenset()) for value, _ in operands))
        for atom in atoms_of(operands[0][1]):
            if atom.size > 1 and atom.identity not in known:
                algebra.block(
                    atom, f"{targets[name]} sums over units that are not zero when their weights are"
                )


def _zero_units(graph: OperatorGraph, algebra: Algebra) -> dict[str, Atoms]:
    """Return for each value the atoms along which it is zero at a unit whose parameters are all zero."""
    zero: dict[str, Atoms] = {
        name: _atoms(algebra, value) for name, value in graph.weights.items() if value.role == "parameter"
    }
    for operator in graph.operators:
        for output in operator.outputs:
            if output is not None:
                zero[output.name] = _of_result(operator, output, zero, algebra)
    return zero


def _of_result(operator: Operator, output: Value, zero: dict[str, Atoms], algebra: Algebra) -> Atoms:
    how, spanned = vanishing_of(operator.target), _atoms(algebra, output)
    if how == "zero":
        return spanned
    operands = [value for value in operator.inputs if value.dtype != "bool"]
    found = [zero.get(value.name, frozenset()) for value in operands]
    if how == "never" or not operands:
        return frozenset()
    if how == "any":
        return _product(operator, zero, found) & spanned
    if how == "all":
        return frozenset() if _adds_a_number(operator) else spanned.intersection(*found)
    if how == "each":
        held = [_atoms(algebra, value) for value in operands]
        missed = frozenset().union(*(atoms - own for atoms, own in zip(held, found, strict=True)))
        return (spanned & frozenset().union(*held)) - missed
    operand = (operator["value"] or operator["V"] if how == "value" else None) or operands[0]
    return zero.get(operand.name, frozenset()) & spanned


def _product(operator: Operator, zero: dict[str, Atoms], found: list[Atoms]) -> Atoms:
    """A product is zero where a factor is, unless something is added to it."""
    added = operator[_ADDED.get(operator.target, "bias")]
    if not isinstance(added, Value):
        return frozenset().union(*found)
    factors = [zero.get(v.name, frozenset()) for v in operator.inputs if v is not added]
    return frozenset().union(*factors) & zero.get(added.name, frozenset())


def _adds_a_number(operator: Operator) -> bool:
    numbers = [operator[name] for name in ("self", "other", "value")]
    return any(isinstance(number, (int, float)) and number != 0 for number in numbers)


def _atoms(algebra: Algebra, value: Value) -> Atoms:
    axes = algebra.known(value.name) or []
    return frozenset(atom.identity for axis in axes if axis.size > 1 for atom in atoms_of(axis))
