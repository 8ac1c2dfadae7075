"""Linear maps of ONNX."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.layout import Layout
from graphprune.coupling.rules.contraction import convolution, matmul, multiply
from graphprune.coupling.rules.onnx_reshaping import asking
from graphprune.coupling.rules.registry import rule
from graphprune.errors import CouplingError
from graphprune.trace.graph import Operator, Value

rule("onnx.MatMul")(matmul)


@rule("onnx.Gemm")
def gemm(operator: Operator, algebra: Algebra) -> Axes:
    """Return α A B + β C, either matrix transposed on request."""
    added = operator["C"]
    flips = {"flip_first": bool(operator["transA"]), "flip_second": bool(operator["transB"])}
    product = multiply(algebra, operator["A"], operator["B"], **flips)
    if added is None:
        return product
    sizes = [axis.size for axis in product]
    return algebra.align([(product, sizes), (algebra[added], added.shape)], sizes)


@rule("com.microsoft.FusedMatMul")
def fused_matmul(operator: Operator, algebra: Algebra) -> Axes:
    """Return α A B, either stack of matrices transposed on request."""
    if operator["transBatchA"] or operator["transBatchB"]:
        raise CouplingError("FusedMatMul turns its batch axes", "turn them by a Transpose before it")
    flips = {"flip_first": bool(operator["transA"]), "flip_second": bool(operator["transB"])}
    return multiply(algebra, operator["A"], operator["B"], **flips)


@rule("onnx.Conv")
def conv(operator: Operator, algebra: Algebra) -> Axes:
    """Convolve; the weight is (out, in / groups, …)."""
    call = asking(
        operator, input=operator["X"], weight=operator["W"], bias=operator["B"], groups=operator["group"]
    )
    return convolution(call, algebra)


@rule(
    *(f"onnx.{kind}{name}" for kind in ("", "Global") for name in ("AveragePool", "MaxPool")),
    "onnx.LpPool",
)
def pool(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Take means or maxima over positions, each channel for itself."""
    source = operator["X"]
    batch, channels, *positions = algebra[source]
    for axis in positions:
        algebra.pin(axis, "positions that a window slides over")
    results: list[Axes] = []
    for value in operator.outputs:
        spatial = algebra.fresh(value.shape[2:] if value else ())
        for axis in spatial:
            algebra.pin(axis, "positions that a window slides over")
        results.append([batch, channels, *spatial])
    return tuple(results)


@rule("onnx.Einsum")
def einsum(operator: Operator, algebra: Algebra) -> Axes:
    """Axes under one letter are equal; letters that the result lacks are summed."""
    equation = operator["equation"].replace(" ", "")
    if "->" not in equation or "." in equation:
        raise CouplingError(f"the equation '{equation}' is implicit", "write its result out")
    terms, result = equation.split("->")
    by_letter: dict[str, Layout] = {}
    operands: tuple[Value, ...] = operator["Inputs"]
    for term, value in zip(terms.split(","), operands, strict=True):
        for position, letter in enumerate(term):
            axis = algebra.produce(value, position) if letter in result else algebra.consume(value, position)
            algebra.same(by_letter.setdefault(letter, axis), axis)
    activations = not any(algebra.is_weight(value) for value in operands)
    if activations:
        algebra.mark([axis for letter, axis in by_letter.items() if letter not in result], "head_dim")
    return [by_letter[letter] for letter in result]
