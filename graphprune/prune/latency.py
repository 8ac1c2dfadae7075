"""Latency as a cost: the measured time of a model's matrix products, as a function of the units that groups keep.

Each group has a table of its own: the time of all products that its width enters, at some widths, made monotone and
interpolated. Times of groups add up, and so do those of products that no group enters. What runs between products
(norms, activations) is not counted.

Source: ZipLM (arXiv 2302.04089), which prunes by such a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphprune.errors import BudgetError
from graphprune.prune.contractions import VaryingProduct, varying_products
from graphprune.prune.costs import Measured, cost
from graphprune.prune.polynomial import UnitSizes

POINTS = 8
"""Widths of a group at which its products are measured, evenly spaced."""
RESOLUTION = 0.005
"""The share of the whole that a measured difference must reach to be told from noise."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Seconds as a function of a width: linear between points, which ascend in both.

    Attributes:
        widths: (points,), from 0.
        seconds: (points,).
    """

    widths: Numbers
    seconds: Numbers

    @classmethod
    def of(cls, measured: Mapping[int, float]) -> Table:
        """Return the table that is nearest to measurements, by width, and falls nowhere."""
        widths = np.array(sorted({0, *measured}), dtype=np.float64)
        seconds = np.array([measured.get(int(width), 0.0) for width in widths])
        return cls(widths, isotonic(seconds))

    def __call__(self, width: Any) -> Any:
        """Return the seconds at a width, or at an array of them."""
        return np.interp(width, self.widths, self.seconds)


@dataclass(frozen=True, slots=True, eq=False)
class Tabulated:
    """A cost that is a sum of tables, each of one variable.

    Attributes:
        base: What depends on no variable.
        tables: With the names of their variables.
        resolution: Which share of the whole can be told from noise.
    """

    base: float
    tables: tuple[tuple[str, Table], ...]
    resolution: float = RESOLUTION

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Return the value at numbers, or the values at arrays of one shape."""
        return self.base + sum(table(values[name]) for name, table in self.tables)

    def products(self) -> Iterable[tuple[str, ...]]:
        """Return the variable of each table."""
        return [(name,) for name, _ in self.tables]

    def involving(self, names: Collection[str]) -> Tabulated:
        """Return the sum of the tables of some variables."""
        return replace(self, base=0.0, tables=tuple(entry for entry in self.tables if entry[0] in names))

    def renamed(self, names: Mapping[str, str]) -> Tabulated:
        """Return it with variables called by other names; several may be given the same."""
        return replace(self, tables=tuple((names.get(name, name), table) for name, table in self.tables))

    def fixed(self, values: Mapping[str, float]) -> Tabulated:
        """Return it with some of the variables replaced by numbers."""
        gone = self.involving(values)
        rest = tuple(entry for entry in self.tables if entry[0] not in values)
        return replace(self, base=self.base + float(gone(values)), tables=rest)


def isotonic(values: Numbers) -> Numbers:
    """Return the ascending sequence that is nearest to one in the sum of squares.

    Source: pool adjacent violators (Barlow, Bartholomew, Bremner and Brunk, 1972).
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])


@cost("latency")
def latency(measured: Measured, sizes: UnitSizes) -> Tabulated:
    """Sum up measured seconds of all matrix products that tokens cost on their way through a model.

    Raises:
        BudgetError: If there are no times, or a product is of the widths of several groups.
    """
    if measured.times is None:
        raise BudgetError(
            "a budget of latency needs measured times", "give them: Measured(..., times=TimeTable())"
        )
    times, base = measured.times, 0.0
    of_group: dict[str, list[VaryingProduct]] = {name: [] for name in sizes.variables.values()}
    for product in varying_products(
        measured.groups, measured.counted, sizes, tokens=measured.tokens, sequence=measured.sequence
    ):
        names = sorted(product.names)
        if len(names) > 1:
            raise BudgetError(
                f"'{names[0]}' and '{names[1]}' are widths of one matrix product, and a table of latency is of one "
                "width",
                "ask for a budget of macs, or leave one of these kinds out",
            )
        if names:
            of_group[names[0]].append(product)
        else:
            base += times(product.at({}))
    tables = {}
    for name, products in of_group.items():
        widths = _widths(measured.groups[name].size)
        tables[name] = Table.of(
            {k: sum(times(product.at({name: k})) for product in products) for k in widths}
        )
    return Tabulated(base, tuple(tables.items()))


def _widths(size: int) -> list[int]:
    return sorted({max(1, round(size * point / POINTS)) for point in range(1, POINTS + 1)})
