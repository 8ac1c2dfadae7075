"""Linear maps: the contracted axes are equal and gone from the result."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator, Value


@rule("aten.linear", vanishes="any")
def linear(operator: Operator, algebra: Algebra) -> Axes:
    """Return x Wᵀ + b, with W as (out, in)."""
    source, weight, bias = operator["input"], operator["weight"], operator["bias"]
    if len(weight.shape) == 1:
        algebra.contract(source, -1, weight, 0)
        return list(algebra[source][:-1])
    algebra.contract(source, -1, weight, 1)
    produced = algebra.produce(weight, 0)
    if bias is not None:
        algebra.same(algebra[bias][0], produced)
    return [*algebra[source][:-1], produced]


@rule("aten.addmm", "aten.baddbmm", vanishes="any")
def add_product(operator: Operator, algebra: Algebra) -> Axes:
    """Return b + x y."""
    added = operator["self"]
    names = ("mat1", "mat2") if operator["mat1"] is not None else ("batch1", "batch2")
    first, second = (operator[name] for name in names)
    shape = operator.outputs[0].shape  # type: ignore[union-attr]
    product = matrix_product(algebra, first, second, shape)
    return algebra.align([(product, shape), (algebra[added], added.shape)], shape)


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", vanishes="any")
def matmul(operator: Operator, algebra: Algebra) -> Axes:
    """Return x y; further axes in front are batches of matrices."""
    (output,) = operator.outputs
    first, second = operator.inputs[:2]
    return matrix_product(algebra, first, second, output.shape if output else ())


def matrix_product(
    algebra: Algebra,
    first: Value,
    second: Value,
    shape: Sequence[int],
    *,
    flips: tuple[bool, bool] = (False, False),
) -> Axes:
    """Contract the last axis of one operand with the last but one of the other, as ``torch.matmul`` does.

    Args:
        algebra: What holds the layouts.
        first: (…, rows, inner).
        second: (…, inner, columns).
        shape: Of the result.
        flips: Which operands have their last two axes the other way round.
    """
    x, y = algebra[first], algebra[second]
    if min(len(x), len(y)) < 2:
        algebra.contract(first, -1, second, 0 if len(y) == 1 else -2)
        return [*y[:-2], y[-1]] if len(y) > 1 else list(x[:-1])
    rows, inner = (-1, -2) if flips[0] else (-2, -1)
    columns, contracted = (-2, -1) if flips[1] else (-1, -2)
    algebra.contract(first, inner, second, contracted)
    batch = algebra.align([(x[:-2], first.shape[:-2]), (y[:-2], second.shape[:-2])], shape[:-2])
    if algebra.is_activation(first) and algebra.is_activation(second):
        algebra.mark(batch, "heads")
        # Scores are contracted over the width of a head; attended values over positions, and have a width left.
        over_positions = _are_positions(algebra, x[inner])
        algebra.mark([y[columns] if over_positions else x[inner]], "head_dim")
    return [*batch, algebra.produce(first, rows), algebra.produce(second, columns)]


@rule("aten.einsum", vanishes="any")
def einsum(operator: Operator, algebra: Algebra) -> Axes:
    """Contract as an equation says: a letter is one axis wherever it stands."""
    operands: tuple[Value, ...] = operator["tensors"]
    inputs, result = _letters(operator["equation"], [len(value.shape) for value in operands])
    places: dict[str, list[tuple[Value, int]]] = {}
    for value, letters in zip(operands, inputs, strict=True):
        for dim, letter in enumerate(letters):
            if value.shape[dim] != 1:
                places.setdefault(letter, []).append((value, dim))
    for letter, found in places.items():
        (first, first_dim), *rest = found
        for value, dim in rest:
            algebra.same(algebra[first][first_dim], algebra[value][dim])
        for value, dim in found:
            algebra.take_side(value, dim, "produces" if letter in result else "consumes")
        if letter not in result:
            algebra.sum_over(found)
    if len(operands) == 2 and all(algebra.is_activation(value) for value in operands):
        _mark_attention(algebra, operands, inputs, result)
    one = algebra.fresh([1])[0]
    return [algebra[places[x][0][0]][places[x][0][1]] if x in places else one for x in result]


@rule("aten.outer", "aten.ger", vanishes="any")
def outer(operator: Operator, algebra: Algebra) -> Axes:
    """Multiply every number with every other."""
    first, second = operator.inputs[:2]
    return [algebra[first][0], algebra[second][0]]


@rule(
    "transformers.grouped_mm_fallback.default",
    "aten._grouped_mm.default",
    "aten._grouped_mm",
    vanishes="any",
)
def grouped_matmul(operator: Operator, algebra: Algebra) -> Axes:
    """Multiply consecutive rows of x with a matrix of their own each: W is (matrices, in, out)."""
    source, weight, ends = operator.inputs[:3]
    matrices = algebra[weight][0]
    counted = algebra.understand(ends, "boundaries")
    if counted is None:
        algebra.pin(matrices, f"{operator.target} takes its matrices in the order of the rows")
        algebra.pin(algebra[ends][0], f"{operator.target} takes its matrices in the order of the rows")
    else:
        algebra.same(matrices, counted)
    algebra.contract(source, -1, weight, 1)
    return [algebra[source][0], algebra.produce(weight, 2)]


def _mark_attention(
    algebra: Algebra, operands: Sequence[Value], inputs: Sequence[list[str]], result: list[str]
) -> None:
    """Mark what two activations share and keep as heads, and what is summed, or left of the second, as their width."""
    first, second = (dict(zip(letters, algebra[value])) for letters, value in zip(inputs, operands))
    algebra.mark([first[letter] for letter in first if letter in second and letter in result], "heads")
    summed = [first[letter] for letter in first if letter in second and letter not in result]
    widths = [axis for axis in summed if not _are_positions(algebra, axis)]
    if len(widths) < len(summed):
        widths += [second[letter] for letter in second if letter not in first]
    algebra.mark(widths, "head_dim")


def _are_positions(algebra: Algebra, axis: Layout) -> bool:
    return any(atom.anchored or "softmax" in atom.marks for atom in algebra.solver.atoms(axis))


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Return the letters of each operand and of the result; axes of an ellipsis become ``.1``, ``.2`` and so on."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    inputs = [_expanded(term, count) for term, count in zip(terms, hidden, strict=True)]
    if arrow:
        return inputs, _expanded(right, max(hidden))
    flat = [letter for letters in inputs for letter in letters]
    once = sorted(letter for letter in set(flat) if flat.count(letter) == 1 and not letter.startswith("."))
    return inputs, [*sorted({letter for letter in flat if letter.startswith(".")}, reverse=True), *once]


def _expanded(term: str, hidden: int) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *([f".{hidden - i}" for i in range(hidden)] if dots else []), *after]
