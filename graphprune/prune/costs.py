"""What a model costs, as a function of how many units each group keeps.

Counts are polynomials, exact for any surgery: no model is built to find out what it would cost.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import BudgetError, RecipeError
from graphprune.prune.contractions import Contraction, Product, axes_of, contractions, size_without_input
from graphprune.prune.polynomial import CostFunction, Polynomial, UnitSizes
from graphprune.trace.graph import Value

Times = Callable[[Product], float]
"""From a matrix product to its seconds."""

_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "int64": 64, "int32": 32, "int8": 8}


@dataclass(frozen=True, slots=True)
class Measured:
    """What is counted, and in which units.

    Attributes:
        groups: The node groups of the model.
        counted: Names of the parameters that count; adapters, which are merged in the end, are none of them.
        sequence: For `macs`: how many positions a token attends to, itself included.
        bits: For `bytes`: bits of a weight on disk, by parameter; others take those of their type.
        cache_bits: For `kv_bytes`: bits of a cached number.
        tokens: For `latency`: how many go through the model at once.
        times: For `latency`: from a matrix product to its measured seconds.
    """

    groups: NodeGroups
    counted: Collection[str]
    sequence: int = 1024
    bits: Mapping[str, float] = field(default_factory=dict)
    cache_bits: int = 16
    tokens: int = 1
    times: Times | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """A cost as a function of the units that groups keep.

    Attributes:
        name: What is counted.
        function: Of units kept, by group name.
        sizes: Units of each group whose units may go.
    """

    name: str
    function: CostFunction
    sizes: Mapping[str, int]

    def __call__(self, kept: Mapping[str, Any] | None = None) -> Any:
        """Return the cost where groups keep so many units, those not named all of theirs.

        Args:
            kept: Numbers of units, or arrays of them of one shape, by group name.
        """
        return self.function({**self.sizes, **(kept or {})})


Counting = Callable[[Measured, UnitSizes], CostFunction]

_COSTS: dict[str, Counting] = {}
_ELSEWHERE = ("graphprune.prune.latency",)
"""Modules that register further costs."""


def cost(name: str) -> Callable[[Counting], Counting]:
    """Register a function as the cost called `name`."""

    def register(function: Counting) -> Counting:
        _COSTS[name] = function
        return function

    return register


def check_cost(name: str, key: str = "") -> None:
    """Check that there is a cost called `name`.

    Args:
        name: Which.
        key: The recipe's key, if it stands in one.

    Raises:
        RecipeError: If there is none.
    """
    for module in _ELSEWHERE:
        importlib.import_module(module)
    if name not in _COSTS:
        raise RecipeError.unknown("cost", name, _COSTS, key)


def cost_named(name: str, measured: Measured, names: Collection[str]) -> Cost:
    """Return a registered cost of a model.

    Args:
        name: Which: ``parameters``, ``macs``, ``kv_bytes``, ``bytes``, ``latency``, or one that was registered.
        measured: What is counted.
        names: Groups whose units may go.

    Raises:
        RecipeError: If there is no cost of that name.
        BudgetError: If the model has nothing to be counted.
    """
    check_cost(name)
    sizes = {group: measured.groups[group].size for group in names}
    return Cost(name, _COSTS[name](measured, UnitSizes.of(measured.groups, names)), sizes)


@cost("parameters")
def parameters(measured: Measured, sizes: UnitSizes) -> Polynomial:
    """Count the elements of all parameters that count, a tied one once."""
    return _sum(elements for _, elements in _weights(measured, sizes))


@cost("bytes")
def bytes_on_disk(measured: Measured, sizes: UnitSizes) -> Polynomial:
    """Count the bytes of all parameters that count, each at its number of bits."""
    return _sum(
        elements * Polynomial.constant(measured.bits.get(value.name, _BITS.get(value.dtype, 32)) / 8)
        for value, elements in _weights(measured, sizes)
    )


@cost("macs")
def macs(measured: Measured, sizes: UnitSizes) -> Polynomial:
    """Count the products of a token's way through all matrix products, attention included.

    Axes of the input (batch and positions) count once; a product of activations with each other, which is attention,
    runs over `Measured.sequence` positions, without regard to a mask.
    """
    return _sum(
        _products(contraction, measured, sizes)
        for contraction in contractions(measured.groups, measured.counted)
    )


@cost("kv_bytes")
def kv_bytes(measured: Measured, sizes: UnitSizes) -> Polynomial:
    """Count the bytes of keys and values that a token leaves in the cache, shared key heads once.

    Raises:
        BudgetError: If nothing in the model attends.
    """
    cached = [
        value
        for contraction in contractions(measured.groups, measured.counted)
        for value in contraction.cached
    ]
    if not cached:
        raise BudgetError("this model keeps no keys and values", "ask for a budget of parameters instead")
    per_token = _sum(
        math.prod(
            (size_without_input(axis, sizes, repeated=False) for axis in axes_of(measured.groups, value)),
            start=Polynomial.constant(1),
        )
        for value in cached
    )
    return per_token * Polynomial.constant(measured.cache_bits / 8)


def bits_by_use(
    groups: NodeGroups, counted: Collection[str], *, matrices: float, tables: float
) -> dict[str, float]:
    """Return the bits of weights that are stored quantized: matrices, and tables that are read by index.

    Vectors (norms, biases) stay as they are. A table that is also multiplied with (a tied head) is a table.

    Args:
        groups: The node groups.
        counted: Names of the parameters that count.
        matrices: Bits a weight, scales included.
        tables: Likewise.
    """
    looked_up = {
        value.name
        for operator in groups.graph.operators
        if operator.target.startswith(("aten.embedding", "onnx.Gather"))
        for value in operator.inputs
    }
    return {
        name: tables if name in looked_up else matrices
        for name, value in groups.graph.weights.items()
        if name in counted and len(value.shape) > 1
    }


def _sum(polynomials: Iterator[Polynomial]) -> Polynomial:
    return Polynomial.collected(term for polynomial in polynomials for term in polynomial.terms.items())


def _weights(measured: Measured, sizes: UnitSizes) -> Iterator[tuple[Value, Polynomial]]:
    """Yield the weights that count, with their numbers of elements."""
    for name, value in measured.groups.graph.weights.items():
        if name in measured.counted:
            axes = measured.groups.axes(name)
            lengths = [Polynomial.constant(math.prod(value.shape))]
            if axes:
                lengths = [sizes.length(axis) for axis in axes]
            yield value, math.prod(lengths, start=Polynomial.constant(1))


def _products(contraction: Contraction, measured: Measured, sizes: UnitSizes) -> Polynomial:
    """Return how many products a token costs: the result's size times the length of the sum."""
    output = contraction.operator.outputs[0]
    axes = axes_of(measured.groups, output) if output else []
    # Attention sums over positions too, which count once; others over features, of the input's own perhaps.
    length_of = partial(size_without_input, sizes=sizes) if contraction.attends else sizes.length
    length = math.prod(map(length_of, contraction.summed), start=Polynomial.constant(1))
    if contraction.is_fused:
        length = length + size_without_input(axes.pop(), sizes)
    factor = contraction.window * (measured.sequence if contraction.attends else 1)
    return (
        math.prod((size_without_input(axis, sizes) for axis in axes), start=Polynomial.constant(factor))
        * length
    )
