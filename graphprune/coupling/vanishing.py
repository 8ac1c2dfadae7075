"""Sums over units: removing a unit equals zeroing it only where its terms are zero once its parameters are.

A linear layer's outputs are zero along a unit whose rows and bias are; after an exponential they are one. So a mean of
squares may lose a unit, and a softmax written as a quotient of sums may not.
"""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra
from graphprune.coupling.layout import Layout, atoms_of, find
from graphprune.coupling.rules import vanishing_of
from graphprune.trace.graph import Operator, OperatorGraph, Value

Atoms = frozenset[int]
_NONE: Atoms = frozenset()

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
    parameters = {name for name, value in graph.weights.items() if value.role == "parameter"}
    # A factor that is a parameter is zero along its units; only sums of activations alone have to be looked into.
    sums = [
        (name, operands)
        for name, operands in algebra.sums
        if not any(value.name in parameters for value, _ in operands)
    ]
    watched = frozenset(atom.identity for _, ((_, axis), *_) in sums for atom in atoms_of(axis))
    zeros = _Zeros(graph, algebra, watched)
    targets = {operator.name: operator.target for operator in graph.operators}
    for name, operands in sums:
        known = frozenset().union(*(zeros.along(value) for value, _ in operands))
        for atom in atoms_of(operands[0][1]):
            if atom.size > 1 and atom.identity not in known:
                why = "".join(dict.fromkeys(zeros.lost(value, atom) for value, _ in operands))
                algebra.block(
                    atom, f"{targets[name]} sums over units that are not zero when their weights are{why}"
                )


class _Zeros:
    """Along which atoms each value is zero at a unit whose parameters are all zero.

    Args:
        graph: The operator graph.
        algebra: Its layouts.
        watched: The atoms that matter.
    """

    def __init__(self, graph: OperatorGraph, algebra: Algebra, watched: Atoms) -> None:
        self._algebra = algebra
        self._watched = watched
        self._held: dict[int, Atoms] = {}
        self._producers = {
            output.name: operator for operator in graph.operators for output in operator.outputs if output
        }
        self._zero: dict[str, Atoms] = {
            name: self._spanned(value) for name, value in graph.weights.items() if value.role == "parameter"
        }
        for operator in graph.operators:
            for output in operator.outputs:
                if output is not None:
                    self._zero[output.name] = self._of_result(operator, output)

    def along(self, value: Value) -> Atoms:
        """Return the watched atoms along which a value is zero."""
        return self._zero.get(value.name, _NONE)

    def lost(self, value: Value, atom: Layout) -> str:
        """Return, for the reason, which operator made `value` of what is zero along `atom`, and is so no more."""
        operator = self._producers.get(value.name)
        while operator is not None:
            spanning = [source for source in operator.sources if atom.identity in self._spanned(source)]
            if any(atom.identity in self.along(source) for source in spanning):
                return f"; by its rule, {operator.target} need not leave zero as zero"
            before = (self._producers.get(source.name) for source in spanning)
            operator = next((found for found in before if found is not None), None)
        return ""

    def _of_result(self, operator: Operator, output: Value) -> Atoms:
        how, spanned = vanishing_of(operator.target), self._spanned(output)
        if how == "zero" or not spanned:
            return spanned
        operands = [value for value in operator.sources if value.dtype != "bool"]
        if how == "never" or not operands or _is_not_zero_at_zero(operator):
            return _NONE
        if how == "any":
            return self._of_product(operator, operands) & spanned
        if how == "all":
            return spanned.intersection(*(self.along(value) for value in operands))
        if how == "affine":
            return self._of_affine(operator) & spanned
        if how == "each":
            missed = _NONE.union(*(self._spanned(value) - self.along(value) for value in operands))
            return (spanned & _NONE.union(*(self._spanned(value) for value in operands))) - missed
        operand = (operator["value"] or operator["V"] if how == "value" else None) or operands[0]
        return self.along(operand) & spanned

    def _of_product(self, operator: Operator, operands: list[Value]) -> Atoms:
        """A product is zero where a factor is, unless something is added to it."""
        added = operator[_ADDED.get(operator.target, "bias")]
        if not isinstance(added, Value):
            return _NONE.union(*(self.along(value) for value in operands))
        factors = (self.along(value) for value in operands if value is not added)
        return _NONE.union(*factors) & self.along(added)

    def _of_affine(self, operator: Operator) -> Atoms:
        """A norm's result is zero where both its weight and its bias are."""
        weight = operator["weight"] or operator["scale"] or operator["Scale"]
        bias = operator["bias"] or operator["B"]
        if not isinstance(weight, Value) or not isinstance(bias, Value):
            return _NONE
        return self.along(weight) & self.along(bias)

    def _spanned(self, value: Value) -> Atoms:
        """Return the watched atoms that a value's axes hold."""
        axes = self._algebra.known(value.name) or ()
        return _NONE.union(*(self._of_axis(find(axis)) for axis in axes if axis.size > 1))

    def _of_axis(self, axis: Layout) -> Atoms:
        if axis.identity not in self._held:
            own = frozenset(atom.identity for atom in atoms_of(axis))
            self._held[axis.identity] = own & self._watched
        return self._held[axis.identity]


def _is_not_zero_at_zero(operator: Operator) -> bool:
    """Whether an operator adds a number, or takes a power of zero that is not zero."""
    if "pow" in operator.target.lower():
        exponent = operator["exponent"]
        return isinstance(exponent, (int, float)) and exponent <= 0
    numbers = [operator[name] for name in ("self", "other", "value")]
    return vanishing_of(operator.target) == "all" and any(
        isinstance(number, (int, float)) and number != 0 for number in numbers
    )
