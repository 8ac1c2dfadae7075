"""Reading and writing by index.

Where the indices are known numbers, an axis is cut into the runs that are read, in their order. Where they are
results of a choice among units (top-k routing), they name units, and follow them when units are renumbered.
Otherwise an index reads by number, and what it reads stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator, Value

_MANY = 256  # runs of known indices, beyond which an axis is left alone


@rule("aten.embedding", vanishes="any")
def embedding(operator: Operator, algebra: Algebra) -> Axes:
    """Read rows of a table by index."""
    weight, indices = operator["weight"], operator["indices"]
    return [*_read(operator, algebra, weight, 0, indices), algebra.produce(weight, 1)]


@rule("aten.index_select", vanishes="first")
def index_select(operator: Operator, algebra: Algebra) -> Axes:
    """Read indices along one axis."""
    source, dim = operator["self"], operator["dim"] % len(operator["self"].shape)
    axes = list(algebra[source])
    axes[dim : dim + 1] = _read(operator, algebra, source, dim, operator["index"])
    return axes


@rule("aten.index.Tensor", vanishes="first")
def index(operator: Operator, algebra: Algebra) -> Axes:
    """Read indices along some axes; their broadcast axes stand where the indexed axes stood, or in front."""
    source = operator["self"]
    indexed = _indexed(operator["indices"])
    if any(value.dtype == "bool" for value in indexed.values()):
        return _pinned(operator, algebra)
    axes = algebra[source]
    if len(indexed) == 1:
        ((dim, value),) = indexed.items()
        return [*axes[:dim], *_read(operator, algebra, source, dim, value), *axes[dim + 1 :]]
    shape = np.broadcast_shapes(*(value.shape for value in indexed.values()))
    result = algebra.broadcast(list(indexed.values()), shape)
    for dim, value in indexed.items():
        _by_number(operator, algebra, source, dim, value)
    dims = sorted(indexed)
    rest = [axis for dim, axis in enumerate(axes) if dim not in indexed]
    place = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return [*rest[:place], *result, *rest[place:]]


@rule("aten.index_put", "aten.index_add", "aten.index_copy", vanishes="never")
def write(operator: Operator, algebra: Algebra) -> Axes:
    """Write along some axes by index; the axes that are written whole are those of what is written."""
    source = operator["self"]
    axes = list(algebra[source])
    if operator["indices"] is not None:
        indexed, written = _indexed(operator["indices"]), operator["values"]
    else:
        indexed, written = {operator["dim"] % len(axes): operator["index"]}, operator["source"]
    if any(value.dtype == "bool" for value in indexed.values()):
        return _pinned(operator, algebra)
    for dim, value in indexed.items():
        _by_number(operator, algebra, source, dim, value)
    # Only trailing axes line up whatever the number of index axes in front is.
    trailing = len(axes) - 1 - max(indexed)
    for distance in range(1, trailing + 1):
        if len(written.shape) >= distance and written.shape[-distance] != 1:
            algebra.same(axes[-distance], algebra[written][-distance])
    for dim in range(max(indexed)):
        if dim not in indexed:
            algebra.pin(axes[dim], f"{operator.target} writes it together with an indexed axis")
    for axis in algebra[written][: len(written.shape) - trailing]:
        algebra.pin(axis, f"{operator.target} writes it by number")
    return axes


@rule("aten.gather", "aten.take_along_dim", vanishes="first")
def gather(operator: Operator, algebra: Algebra) -> Axes:
    """Read one index along an axis for each place of the result."""
    source, value = operator["self"], operator["index"] or operator["indices"]
    dim = operator["dim"] % len(source.shape)
    _by_number(operator, algebra, source, dim, value)
    _beside(operator, algebra, [source, value], dim)
    return list(algebra[value])


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(operator: Operator, algebra: Algebra) -> Axes:
    """Write one index along an axis for each place of the source."""
    target, value = operator["self"], operator["index"]
    dim = operator["dim"] % len(target.shape)
    _by_number(operator, algebra, target, dim, value)
    written = operator["src"]
    _beside(operator, algebra, [target, value, *([written] if isinstance(written, Value) else [])], dim)
    if isinstance(written, Value):
        algebra.same(algebra[written][dim], algebra[value][dim])
    return list(algebra[target])


@rule("aten.one_hot")
def one_hot(operator: Operator, algebra: Algebra) -> Axes:
    """Mark the unit that each number names."""
    value = operator["self"]
    named = algebra.understand(value)
    (output,) = operator.outputs
    size = output.shape[-1] if output else 0
    if named is None or named.size != size:
        if named is not None:
            algebra.pin(named, f"{operator.target} counts further than its units")
        named = algebra.ordered(size, operator.target)
    return [*algebra[value], named]


def _read(operator: Operator, algebra: Algebra, source: Value, dim: int, value: Value) -> Axes:
    """Return the axes that an index puts in the place of the axis it reads."""
    axis = algebra[source][dim]
    if value.content is not None and value.content.ndim == 1:
        numbers = np.where(value.content < 0, value.content + source.shape[dim], value.content)
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        if len(runs) <= _MANY and len(numbers):
            return [algebra.concat([algebra.segment(axis, int(run[0]), len(run)) for run in runs])]
    _by_number(operator, algebra, source, dim, value)
    return list(algebra[value])


def _by_number(operator: Operator, algebra: Algebra, source: Value, dim: int, value: Value) -> None:
    """Couple an axis that is read by index with the units that the index names, or pin it."""
    axis = algebra[source][dim]
    named = algebra.understand(value)
    if named is not None and named.size == axis.size:
        algebra.same(named, axis)
        return
    if named is not None:
        algebra.pin(named, f"{operator.target} reads another axis by its numbers")
    if source.is_weight or not algebra.is_activation(source):
        algebra.mark([axis], "lookup")
        algebra.pin(axis, "a lookup reads its rows by number")
    else:
        algebra.pin(axis, f"{operator.target} reads its units by number")


def _beside(operator: Operator, algebra: Algebra, values: Sequence[Value], dim: int) -> None:
    """Couple the axes beside the one that is read: whole where sizes agree, or pinned."""
    first, *rest = values
    for value in rest:
        for position in range(len(first.shape)):
            if position == dim:
                continue
            if first.shape[position] == value.shape[position]:
                algebra.same(algebra[first][position], algebra[value][position])
            else:
                for axis in (algebra[first][position], algebra[value][position]):
                    algebra.pin(axis, f"{operator.target} reads only the beginning of it")


def _indexed(indices: Sequence[Value | None]) -> dict[int, Value]:
    return {dim: value for dim, value in enumerate(indices) if value is not None}


def _pinned(operator: Operator, algebra: Algebra) -> Axes:
    (axes,) = algebra.opaque(operator, "with a mask picks a number of units that is not known")
    return axes
