"""Linear maps of ONNX."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules import contraction, convolution
from graphprune.coupling.rules.onnx_reshaping import asking
from graphprune.coupling.rules.registry import rule
from graphprune.errors import CouplingError
from graphprune.trace.graph import Operator

rule("onnx.MatMul", vanishes="any")(contraction.matmul)


@rule("onnx.Gemm", vanishes="any")
def gemm(operator: Operator, algebra: Algebra) -> Axes:
    """Return α A B + β C, either matrix transposed on request."""
    added, product = operator["C"], _product(operator, algebra)
    if added is None:
        return product
    sizes = [axis.size for axis in product]
    return algebra.align([(product, sizes), (algebra[added], added.shape)], sizes)


@rule("com.microsoft.FusedMatMul", vanishes="any")
def fused_matmul(operator: Operator, algebra: Algebra) -> Axes:
    """Return α A B, either stack of matrices transposed on request."""
    if operator["transBatchA"] or operator["transBatchB"]:
        raise CouplingError("FusedMatMul turns its batch axes", "turn them by a Transpose before it")
    return _product(operator, algebra)


def _product(operator: Operator, algebra: Algebra) -> Axes:
    (output,) = operator.outputs
    flips = bool(operator["transA"]), bool(operator["transB"])
    shape = output.shape if output else ()
    return contraction.matrix_product(algebra, operator["A"], operator["B"], shape, flips=flips)


@rule("onnx.Conv", vanishes="any")
def conv(operator: Operator, algebra: Algebra) -> Axes:
    """Convolve; the weight is (out, in / groups, …)."""
    return convolution.convolution(_by_channels(operator), algebra)


@rule("onnx.ConvTranspose", vanishes="any")
def conv_transpose(operator: Operator, algebra: Algebra) -> Axes:
    """Convolve the other way round; the weight is (in, out / groups, …)."""
    return convolution.transposed_convolution(_by_channels(operator), algebra)


def _by_channels(operator: Operator) -> Operator:
    return asking(
        operator, input=operator["X"], weight=operator["W"], bias=operator["B"], groups=operator["group"]
    )


@rule(
    *(f"onnx.{kind}{name}" for kind in ("", "Global") for name in ("AveragePool", "MaxPool")),
    "onnx.LpPool",
    vanishes="first",
)
def pool(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Take means or maxima over positions, each channel for itself."""
    batch, channels, *positions = algebra[operator["X"]]
    for axis in positions:
        algebra.pin(axis, f"positions that {operator.target} slides over")
    return tuple(
        [
            batch,
            channels,
            *(algebra.ordered(size, operator.target) for size in (value.shape[2:] if value else ())),
        ]
        for value in operator.outputs
    )


@rule("onnx.Einsum", vanishes="any")
def einsum(operator: Operator, algebra: Algebra) -> Axes:
    """Contract as an equation says."""
    call = asking(operator, equation=operator["equation"], tensors=operator["Inputs"])
    return contraction.einsum(call, algebra)
