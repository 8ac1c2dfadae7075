"""Low-rank updates of weights, found in the operator graph: B A x added to W x for one and the same x.

Nothing is known of the library that attached them: what counts is that two matrix products in a row lie beside a
third one. Updates that are more than that (DoRA's rescaling, say) do not have this form and are not found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from graphprune.trace.graph import Operator, OperatorGraph, Value

_PRODUCTS = {
    "aten.linear.default": ("input", "weight", 1),
    "aten.addmm.default": ("mat1", "mat2", 0),
    "aten.mm.default": ("self", "mat2", 0),
    "aten.matmul.default": ("self", "other", 0),
}
"""Matrix products: the argument that is read, the weight, and which axis of it is contracted."""
_PASSING = {
    f"aten.{name}"
    for name in (
        *(
            "to.dtype",
            "to.dtype_layout",
            "to.device",
            "_to_copy.default",
            "clone.default",
            "contiguous.default",
        ),
        *("view.default", "reshape.default", "_unsafe_view.default", "dropout.default", "alias.default"),
    )
}
"""They keep all numbers, in their order."""
_ADDITIONS = {"aten.add.Tensor", "aten.add_.Tensor"}


@dataclass(frozen=True, slots=True)
class Factors:
    """One low-rank term: scaling · B A.

    Attributes:
        down: Name of A, (rank, in).
        up: Name of B, (out, rank).
        scaling: Such as alpha / rank.
    """

    down: str
    up: str
    scaling: float


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """The low-rank terms that are added to a weight.

    Attributes:
        input_axis: The weight's axis that is contracted with its input: 1 for (out, in).
        factors: The terms.
    """

    input_axis: int
    factors: tuple[Factors, ...]


@dataclass(frozen=True, slots=True)
class _Product:
    """A matrix product with a weight; `source` is the name of what the weight is multiplied by."""

    source: str
    weight: Value
    input_axis: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.weight.shape[1 - self.input_axis], self.weight.shape[self.input_axis]


def low_rank_updates(graph: OperatorGraph) -> Mapping[str, LowRankUpdate]:
    """Return the low-rank updates in a graph by the name of the weight that they update."""
    paths = _Paths(graph)
    axes: dict[str, int] = {}
    factors: dict[str, dict[Factors, None]] = defaultdict(dict)
    for operator in graph.operators:
        up = paths.product(operator)
        down = up and paths.product(paths.producers.get(up.source))
        if not up or not down or up.input_axis != 1 or down.input_axis != 1:
            continue
        scaling, others = paths.beside(operator)
        for other in others:
            if other.source == down.source and other.shape == (up.shape[0], down.shape[1]):
                axes[other.weight.name] = other.input_axis
                factors[other.weight.name][Factors(down.weight.name, up.weight.name, scaling)] = None
    return {weight: LowRankUpdate(axes[weight], tuple(terms)) for weight, terms in factors.items()}


class _Paths:
    """Ways through a graph that change no number but by a known factor."""

    def __init__(self, graph: OperatorGraph) -> None:
        self.producers = {
            value.name: operator for operator in graph.operators for value in operator.outputs if value
        }
        self._consumers: dict[str, list[Operator]] = defaultdict(list)
        for operator in graph.operators:
            for value in operator.inputs:
                self._consumers[value.name].append(operator)

    def product(self, operator: Operator | None) -> _Product | None:
        """Return the product with a matrix of weights that an operator is, or None."""
        if operator is None or operator.target not in _PRODUCTS:
            return None
        source, weight, input_axis = _PRODUCTS[operator.target]
        read, matrix = operator[source], operator[weight]
        if not isinstance(read, Value) or not isinstance(matrix, Value) or not matrix.is_weight:
            return None
        if len(matrix.shape) != 2 or operator["alpha"] not in (None, 1):
            return None
        return _Product(self._origin(read).name, matrix, input_axis)

    def beside(self, operator: Operator) -> tuple[float, list[_Product]]:
        """Return by which factor a result is multiplied before it is added, and the products that it is added to."""
        scaling = 1.0
        while len(consumers := self._consumers[_result(operator)]) == 1:
            value, operator = _result(operator), consumers[0]
            factor = _factor(operator)
            if operator.target in _ADDITIONS and operator.inputs[0].name != operator.inputs[-1].name:
                return self._added(operator, value, scaling)
            if factor is None:
                break
            scaling *= factor
        return scaling, []

    def _added(self, addition: Operator, value: str, scaling: float) -> tuple[float, list[_Product]]:
        alpha = float(addition["alpha"] or 1)
        first, last = addition.inputs[0], addition.inputs[-1]
        if last.name == value:
            return scaling * alpha, self._addends(first)
        return scaling, self._addends(last) if alpha == 1 else []

    def _addends(self, value: Value) -> list[_Product]:
        """Return the products among the terms of a sum."""
        found, pending = [], [value]
        while pending:
            operator = self.producers.get(self._origin(pending.pop()).name)
            product = self.product(operator)
            if product is not None:
                found.append(product)
            elif operator is not None and operator.target in _ADDITIONS and operator["alpha"] == 1:
                pending.extend(operator.inputs)
        return found

    def _origin(self, value: Value) -> Value:
        """Return the value with the same numbers that comes first."""
        while (operator := self.producers.get(value.name)) is not None and operator.target in _PASSING:
            value = operator.inputs[0]
        return value


def _result(operator: Operator) -> str:
    output = operator.outputs[0]
    return output.name if output else ""


def _factor(operator: Operator) -> float | None:
    """Return the number that an operator multiplies by, or None if it does something else."""
    if operator.target in _PASSING:
        return 1.0
    other = operator["other"]
    if isinstance(other, Value) or not isinstance(other, int | float):
        return None
    return {"aten.mul.Tensor": float(other), "aten.div.Tensor": 1 / other if other else None}.get(
        operator.target
    )
