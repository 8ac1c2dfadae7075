"""Example sizes for the symbolic dimensions of an ONNX model.

Any sizes would do for the analysis, which works on axes; they only have to fit each other. Nothing in a file says
that the length of an attention mask is that of the cache plus that of the new text, so sizes start out distinct, and
where two of them meet in an operator that wants them equal, they are made equal: the numbers are chosen such that
each sum of two tells which symbols it is made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphprune.errors import TraceError

_SMALLEST = 11
_LONGEST = 256  # characters of an expression of symbols; anything longer is taken as one


@dataclass(frozen=True)
class ExampleSizes:
    """A size for each symbol.

    Attributes:
        values: By symbol.
        taken: All other sizes in the model.
        places: For each symbol, the ranks and axes of the inputs that it stands in.
        given: Symbols whose size the user chose.
    """

    values: Mapping[str, int]
    taken: frozenset[int]
    places: Mapping[str, frozenset[tuple[int, int]]]
    given: frozenset[str]

    def of(self, dim: int | ir.SymbolicDim, unnamed: str) -> int | None:
        """Return the size of a dimension, or None if it depends on a symbol that no input has.

        Args:
            dim: A number, a symbol, or an expression of symbols.
            unnamed: The symbol's name, should it have none.
        """
        if isinstance(dim, int):
            return dim
        text = dim.value or unnamed
        if text in self.values:
            return self.values[text]
        if not symbols_of(dim, unnamed) <= set(self.values):
            return None
        size = dim.evaluate(self.values)
        return size if isinstance(size, int) and size > 0 else None

    def others(self) -> ExampleSizes:
        """Return another size for each symbol, those that the user chose included."""
        numbers = _distinct({*self.taken, *self.values.values()})
        return replace(self, values={name: next(numbers) for name in self.values}, given=frozenset())

    def mended(self, first: int, second: int) -> ExampleSizes | None:
        """Return sizes at which `first` and `second`, which met in an operator, are equal.

        None if no symbols, or only the user's, account for the difference.
        """
        ways = [
            way
            for one, other in itertools.product(self._sums(first), self._sums(second))
            for way in ((one - other, other - one, one & other), (other - one, one - other, one & other))
            if len(way[0]) == 1 and way[1] and not way[0] & self.given
        ]
        if not ways:
            return None
        (symbol,), rest, shared = min(ways, key=lambda way: len(way[1]))
        return self._with(symbol, sum(self.values[name] for name in rest), shared)

    def _with(self, symbol: str, size: int, kept: frozenset[str]) -> ExampleSizes:
        """Set a symbol, and all but `kept` that stand in the same places of other inputs with it."""
        alike = {
            name
            for name, places in self.places.items()
            if places == self.places[symbol] and name not in self.given | kept and self._deep(name)
        }
        return replace(self, values={**self.values, **dict.fromkeys({symbol, *alike}, size)})

    def _deep(self, symbol: str) -> bool:
        """Whether a symbol belongs to tensors such as a layer's cache, of which there is one for each layer."""
        return all(rank > 2 for rank, _ in self.places[symbol])

    def _sums(self, size: int) -> Iterator[frozenset[str]]:
        """Yield the single symbols and the pairs that have this size; one of several equal symbols stands for all."""
        distinct = {value: name for name, value in reversed(list(self.values.items()))}
        if size in distinct:
            yield frozenset({distinct[size]})
        for one, other in itertools.combinations(distinct, 2):
            if one + other == size:
                yield frozenset({distinct[one], distinct[other]})


def example_sizes(model: ir.Model, given: Mapping[str, int]) -> ExampleSizes:
    """Choose a size for each symbol of the model's inputs that collides with no other size in it.

    Args:
        model: The model.
        given: Sizes that the user chose, by symbol; an unnamed dimension is called ``input:axis``.

    Raises:
        TraceError: If `given` names a symbol that the inputs do not have, or a size below 1.
    """
    places: dict[str, set[tuple[int, int]]] = {}
    taken: set[int] = set(given.values())
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int):
                taken.add(dim)
            elif value.name not in model.graph.initializers:
                for symbol in sorted(symbols_of(dim, f"{value.name}:{axis}")):
                    places.setdefault(symbol, set()).add((len(value.shape or ()), axis))
    for name, size in given.items():
        if name not in places:
            raise TraceError(
                f"the model's inputs have no symbolic dimension '{name}'",
                f"they have {', '.join(places) or 'none: all sizes are fixed'}",
            )
        if size < 1:
            raise TraceError(f"the size of '{name}' is {size}", "give a size of at least 1")
    numbers = _distinct(taken)
    values = {name: given[name] if name in given else next(numbers) for name in places}
    return ExampleSizes(
        values=values,
        taken=frozenset(taken),
        places={name: frozenset(where) for name, where in places.items()},
        given=frozenset(given),
    )


def sizes_of_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ExampleSizes:
    """Return the sizes at which a model's inputs have known shapes.

    Args:
        model: The model.
        shapes: By input; of the symbols that stand in expressions alone, any size will do.
    """
    chosen = example_sizes(model, {})
    values = dict(chosen.values)
    for value in model.graph.inputs:
        for axis, (dim, size) in enumerate(zip(value.shape or (), shapes.get(value.name or "", ()))):
            symbol = f"{value.name}:{axis}" if isinstance(dim, int) or dim.value is None else dim.value
            if symbol in values:
                values[symbol] = size
    return replace(chosen, values=values)


def symbols_of(dim: ir.SymbolicDim, unnamed: str) -> frozenset[str]:
    """Return the symbols in a dimension's expression; a text that is no expression is one symbol."""
    if dim.value is None:
        return frozenset({unnamed})
    if len(dim.value) > _LONGEST:
        return frozenset({dim.value})
    try:
        return dim.free_symbols()
    except ValueError:
        return frozenset({dim.value})


def _distinct(taken: set[int]) -> Iterator[int]:
    """Yield primes that divide none of the sizes `taken` and whose pairwise sums are all different."""
    chosen: list[int] = []
    sums: set[int] = set()
    for number in itertools.count(_SMALLEST, 2):
        prime = all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))
        added = {number + other for other in (*chosen, number)}
        if prime and all(size % number for size in taken) and not added & (sums | taken):
            chosen.append(number)
            sums |= added
            yield number
