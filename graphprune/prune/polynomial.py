"""Sizes as polynomials in the numbers of units that groups keep.

Every axis is a product or a concatenation of atoms, so its length is a polynomial in their sizes, and so is whatever is
counted along axes. How many units stay decides, never which.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout, find


class CostFunction(Protocol):
    """A cost as a function of variables, by their names; a sum of terms."""

    @property
    def base(self) -> float:
        """What depends on no variable."""

    @property
    def resolution(self) -> float:
        """The share of the whole below which a difference says nothing."""

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Return the value at numbers, or the values at arrays of one shape."""

    def products(self) -> Iterable[tuple[str, ...]]:
        """Return the variables of each term."""

    def involving(self, names: Collection[str]) -> Self:
        """Return the sum of the terms that have one of these variables."""

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return it with variables called by other names; several may be given the same."""

    def fixed(self, values: Mapping[str, float]) -> Self:
        """Return it with some of the variables replaced by numbers."""


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A sum of products of variables.

    Attributes:
        terms: Coefficients by the names of the variables in the product, sorted, each as often as it is a factor.
    """

    terms: Mapping[tuple[str, ...], float]

    @classmethod
    def constant(cls, value: float) -> Polynomial:
        """Return a number."""
        return cls({(): value})

    @classmethod
    def variable(cls, name: str) -> Polynomial:
        """Return a variable."""
        return cls({(name,): 1})

    @classmethod
    def collected(cls, terms: Iterable[tuple[tuple[str, ...], float]]) -> Polynomial:
        """Return the sum of terms, like ones put together."""
        found: dict[tuple[str, ...], float] = {}
        for names, coefficient in terms:
            product = tuple(sorted(names))
            found[product] = found.get(product, 0) + coefficient
        return cls(found)

    def __add__(self, other: Polynomial) -> Polynomial:
        return Polynomial.collected((*self.terms.items(), *other.terms.items()))

    def __mul__(self, other: Polynomial) -> Polynomial:
        return Polynomial.collected(
            ((*left, *right), first * second)
            for left, first in self.terms.items()
            for right, second in other.terms.items()
        )

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Return the value at numbers, or the values at arrays of one shape, by the variables' names."""
        return sum(
            coefficient * math.prod(values[name] for name in names)
            for names, coefficient in self.terms.items()
        )

    @property
    def base(self) -> float:
        """The constant term."""
        return self.terms.get((), 0.0)

    @property
    def resolution(self) -> float:
        """None: what is counted is exact."""
        return 0.0

    def products(self) -> Iterable[tuple[str, ...]]:
        """Return the variables of each term."""
        return self.terms.keys()

    def involving(self, names: Collection[str]) -> Polynomial:
        """Return the sum of the terms that have one of these variables."""
        return Polynomial({product: c for product, c in self.terms.items() if set(product) & set(names)})

    def renamed(self, names: Mapping[str, str]) -> Polynomial:
        """Return it with variables called by other names; several may be given the same."""
        return Polynomial.collected(
            (tuple(names.get(name, name) for name in product), coefficient)
            for product, coefficient in self.terms.items()
        )

    def fixed(self, values: Mapping[str, float]) -> Polynomial:
        """Return it with some of the variables replaced by numbers."""
        return Polynomial.collected(
            (
                tuple(name for name in product if name not in values),
                coefficient * math.prod(values[name] for name in product if name in values),
            )
            for product, coefficient in self.terms.items()
        )


@dataclass(frozen=True, slots=True)
class UnitSizes:
    """Lengths of axes as polynomials in units kept.

    Attributes:
        variables: Names of the groups whose units may go, by the identity of their atoms; all others stay whole.
    """

    variables: Mapping[int, str]

    @classmethod
    def of(cls, groups: NodeGroups, names: Collection[str]) -> UnitSizes:
        """Let the units of the groups called `names` vary."""
        return cls({find(groups[name].atom).identity: name for name in names})

    def length(self, layout: Layout) -> Polynomial:
        """Return the length of an axis."""
        layout = find(layout)
        if layout.form == "atom":
            name = self.variables.get(layout.identity)
            return Polynomial.constant(layout.size) if name is None else Polynomial.variable(name)
        parts = [self.length(part) for part in layout.parts]
        if layout.form == "concat":
            return sum(parts, start=Polynomial.constant(0))
        return math.prod(parts, start=Polynomial.constant(1))
