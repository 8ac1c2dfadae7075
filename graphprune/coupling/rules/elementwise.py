"""Element-wise operators: operands' axes are equal, as broadcasting aligns them."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator

_LINEAR = (
    "add.Tensor",
    "add.Scalar",
    "add_.Tensor",
    "sub.Tensor",
    "sub.Scalar",
    "rsub.Scalar",
    "neg.default",
    "mul.Tensor",
    "mul.Scalar",
    "mul_.Tensor",
    "div.Tensor",
    "div.Scalar",
    "div_.Tensor",
    "to.dtype",
    "to.dtype_layout",
    "to.device",
    "to.other",
    "_to_copy.default",
    "type_as.default",
    "contiguous.default",
    "clone.default",
    "alias.default",
    "detach.default",
    "detach_.default",
    "lift_fresh_copy.default",
    "dropout.default",
    "dropout_.default",
    "where.self",
    "where.ScalarOther",
    "where.ScalarSelf",
    "where.Scalar",
    "masked_fill.Scalar",
    "masked_fill.Tensor",
    "float.default",
)

_COMPARISONS = (
    "eq.Tensor",
    "eq.Scalar",
    "ne.Tensor",
    "ne.Scalar",
    "lt.Tensor",
    "lt.Scalar",
    "le.Tensor",
    "le.Scalar",
    "gt.Tensor",
    "gt.Scalar",
    "ge.Tensor",
    "ge.Scalar",
    "__and__.Tensor",
    "__or__.Tensor",
    "logical_and.default",
    "logical_or.default",
    "logical_not.default",
    "bitwise_and.Tensor",
    "bitwise_or.Tensor",
    "bitwise_not.default",
    "minimum.default",
    "maximum.default",
    "min.other",
    "max.other",
)

_NONLINEAR = (
    "relu.default",
    "relu_.default",
    "silu.default",
    "silu_.default",
    "gelu.default",
    "sigmoid.default",
    "tanh.default",
    "exp.default",
    "log.default",
    "sqrt.default",
    "rsqrt.default",
    "reciprocal.default",
    "abs.default",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "cos.default",
    "sin.default",
    "erf.default",
    "softplus.default",
    "leaky_relu.default",
    "elu.default",
    "hardtanh.default",
    "hardswish.default",
    "hardsigmoid.default",
    "mish.default",
    "relu6.default",
    "clamp.default",
    "clamp_min.default",
    "square.default",
)


@rule(*(f"aten.{name}" for name in (*_LINEAR, *_COMPARISONS)))
def elementwise(operator: Operator, algebra: Algebra) -> Axes:
    """Couple all operands, axis by axis."""
    return _broadcast(operator, algebra)


@rule(*(f"aten.{name}" for name in _NONLINEAR))
def nonlinear(operator: Operator, algebra: Algebra) -> Axes:
    """Couple like `elementwise`; the mark tells an FFN's width from a low-rank path."""
    axes = _broadcast(operator, algebra)
    algebra.mark(axes, "nonlinear")
    return axes


def _broadcast(operator: Operator, algebra: Algebra) -> Axes:
    (output,) = operator.outputs
    return algebra.broadcast(operator.inputs, output.shape if output else ())
