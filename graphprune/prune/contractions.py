"""A model's matrix products, with their sizes as polynomials in the units that groups keep."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout, atoms_of, find
from graphprune.errors import BudgetError
from graphprune.prune.polynomial import Polynomial, UnitSizes
from graphprune.trace.graph import Operator, Value


@dataclass(frozen=True, slots=True)
class Contraction:
    """An operator that sums products.

    Attributes:
        operator: The operator.
        operands: What it multiplies.
        summed: The axes that it sums over.
        attends: Whether its operands are both computed from the input by way of parameters.
    """

    operator: Operator
    operands: tuple[Value, ...]
    summed: tuple[Layout, ...]
    attends: bool

    @property
    def is_fused(self) -> bool:
        """Whether it is the whole of an attention: q kᵀ, then values."""
        return self.attends and self.operator["value"] is not None

    @property
    def cached(self) -> tuple[Value, ...]:
        """What attention reads of earlier tokens: key and value, or the second operand of one of its products."""
        if self.is_fused:
            return self.operator["key"], self.operator["value"]
        return self.operands[1:2] if self.attends else ()

    @property
    def window(self) -> int:
        """How many places a convolution sums over for each channel; 1 for all else."""
        convolves = self.operator.target.startswith("aten.conv")
        return math.prod(self.operator["weight"].shape[2:]) if convolves else 1


def contractions(groups: NodeGroups, counted: Collection[str]) -> list[Contraction]:
    """Return what a model multiplies, but for what reads parameters that do not count, which are adapters."""
    dependence = groups.graph.dependence
    mixed = dependence.on_inputs & dependence.on_parameters
    found: dict[str, Contraction] = {}
    for operator, operands in groups.contractions():
        earlier = found[operator.name].summed if operator.name in found else ()
        values = tuple(value for value, _ in operands)
        attends = all(value.name in mixed for value in values)
        found[operator.name] = Contraction(operator, values, (*earlier, operands[0][1]), attends)
    return [each for each in found.values() if not _adapts(each.operator, counted)]


@dataclass(frozen=True, slots=True, order=True)
class Product:
    """A product of matrices: `batch` times (rows, inner) with (inner, columns)."""

    batch: int
    rows: int
    inner: int
    columns: int


@dataclass(frozen=True, slots=True)
class VaryingProduct:
    """A product of matrices whose sizes depend on the units that groups keep."""

    batch: Polynomial
    rows: int
    inner: Polynomial
    columns: Polynomial

    @property
    def names(self) -> set[str]:
        """The groups that it depends on."""
        sizes = (self.batch, self.inner, self.columns)
        return {name for size in sizes for names in size.terms for name in names}

    def at(self, kept: dict[str, int]) -> Product:
        """Return the product where groups keep so many units."""
        batch, inner, columns = (round(size(kept)) for size in (self.batch, self.inner, self.columns))
        return Product(batch, self.rows, inner, columns)


def varying_products(
    groups: NodeGroups, counted: Collection[str], sizes: UnitSizes, *, tokens: int, sequence: int
) -> Iterator[VaryingProduct]:
    """Yield the products of matrices that tokens cost on their way through a model.

    Axes of the input count once; attention is one product for scores and one for values, a head each.

    Args:
        groups: The node groups.
        counted: Names of the parameters that count.
        sizes: Which groups may lose units.
        tokens: How many go through at once.
        sequence: How many positions they attend to.
    """
    one, positions = Polynomial.constant(1), Polynomial.constant(sequence)

    def length(axis: Layout) -> Polynomial:
        return positions if _is_of_input(axis) else size_without_input(axis, sizes)

    for contraction in contractions(groups, counted):
        output = contraction.operator.outputs[0]
        axes = axes_of(groups, output) if output else []
        outer = [size_without_input(axis, sizes) for axis in axes]
        if contraction.is_fused:
            heads = math.prod(outer[:-1], start=one)
            yield VaryingProduct(heads, tokens, length(contraction.summed[0]), positions)
            yield VaryingProduct(heads, tokens, positions, outer[-1])
        elif contraction.attends:
            inner = math.prod(map(length, contraction.summed), start=one)
            yield VaryingProduct(math.prod(outer[:-1], start=one), tokens, inner, length(axes[-1]))
        else:
            window = Polynomial.constant(contraction.window)
            inner = math.prod(map(sizes.length, contraction.summed), start=window)
            yield VaryingProduct(one, tokens, inner, math.prod(outer, start=one))


def axes_of(groups: NodeGroups, value: Value) -> list[Layout]:
    """Return the layouts of a value's axes.

    Raises:
        BudgetError: If they are not known.
    """
    axes = groups.axes(value.name)
    if axes is None:
        raise BudgetError(
            f"the size of '{value.name}' is not known for other numbers of units",
            "ask for a budget of parameters instead",
        )
    return list(axes)


def size_without_input(axis: Layout, sizes: UnitSizes, *, repeated: bool = True) -> Polynomial:
    """Return the length of an axis without what comes from the model's input, and without repetition if told so."""
    axis = find(axis)
    if axis.form == "product":
        parts = (size_without_input(part, sizes, repeated=repeated) for part in axis.parts)
        return math.prod(parts, start=Polynomial.constant(1))
    if _is_of_input(axis) or (not repeated and "repeated" in axis.marks):
        return Polynomial.constant(1)
    return sizes.length(axis)


def _is_of_input(axis: Layout) -> bool:
    """Whether an axis comes from the model's input alone: the batch, positions."""
    atoms = list(atoms_of(find(axis)))
    return bool(atoms) and all(atom.anchored for atom in atoms)


def _adapts(operator: Operator, counted: Collection[str]) -> bool:
    return any(value.role == "parameter" and value.name not in counted for value in operator.inputs)
