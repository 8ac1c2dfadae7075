"""Which pairs of weights are low-rank updates: two linear maps in a row that lie beside another weight."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from graphprune.coupling.algebra import Algebra
from graphprune.coupling.layout import Layout, find
from graphprune.trace.graph import OperatorGraph

Path = tuple[Hashable, Hashable]


class LinearPaths:
    """From which axes to which each parameter of a graph leads.

    Args:
        graph: The operator graph.
        algebra: Its layouts.
    """

    def __init__(self, graph: OperatorGraph, algebra: Algebra) -> None:
        self._graph = graph
        self._algebra = algebra
        self._weights: dict[Path, set[str]] = {}
        for name, value in graph.weights.items():
            if value.role == "parameter":
                for start in self._read(name):
                    for end in self._produced(name):
                        self._weights.setdefault((start, end), set()).add(name)

    def lie_beside_another(self, pair: Sequence[str]) -> bool:
        """Whether two weights, one after the other, lead from where to where a third one leads, as LoRA's do."""
        return any(
            self._weights.get((start, end), set()) - set(pair)
            for first, second in (pair, pair[::-1])
            for start in self._read(first)
            for end in self._produced(second)
        )

    def _read(self, name: str) -> Iterator[Hashable]:
        """Yield what a weight reads along; tables of one height that are read by number read alike."""
        for dim, axis in enumerate(self._algebra.known(name) or ()):
            if "lookup" in find(axis).marks:
                yield "rows", axis.size
            elif self._algebra.sides.get((name, dim)) == "consumes":
                yield _key(axis)

    def _produced(self, name: str) -> Iterator[Hashable]:
        for dim, axis in enumerate(self._algebra.known(name) or ()):
            if self._algebra.sides.get((name, dim)) == "produces":
                yield _key(axis)


def _key(axis: Layout) -> int:
    return find(axis).identity
