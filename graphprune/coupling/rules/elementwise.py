"""Element-wise operators: operands' axes are equal, as broadcasting aligns them."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator

_PRODUCTS = ("mul", "multiply")
_SUMS = (
    "add",
    "sub",
    "subtract",
    "rsub",
    "where.self",
    "where.ScalarOther",
    "where.ScalarSelf",
    "where.Scalar",
    "masked_fill",
)
_CHOICES = ("minimum", "maximum", "min.other", "max.other", "lerp", "fmin", "fmax")
_CASTS = (
    "to",
    "_to_copy",
    "type_as",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "lift_fresh_copy",
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "native_dropout",
    "float",
    "positive",
)
_QUOTIENTS = ("div", "divide", "true_divide", "neg", "negative")
_COMPARISONS = (
    "eq",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "not_equal",
    "addcmul",
    "addcdiv",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "__and__",
    "__or__",
    "__xor__",
    "logical_and",
    "logical_or",
    "logical_xor",
    "logical_not",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "bitwise_not",
    "isnan",
    "isinf",
    "floor_divide",
    "remainder",
    "fmod",
)
_THROUGH_ZERO = (
    "relu",
    "silu",
    "gelu",
    "tanh",
    "abs",
    "absolute",
    "tan",
    "sinh",
    "asin",
    "atan",
    "arctan",
    "asinh",
    "sgn",
    "deg2rad",
    "sqrt",
    "square",
    "sign",
    "sin",
    "erf",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "mish",
    "relu6",
    "hardtanh",
    "hardswish",
    "softsign",
    "tanhshrink",
    "hardshrink",
    "softshrink",
    "log1p",
    "expm1",
    "nan_to_num",
    "round",
    "floor",
    "ceil",
    "trunc",
)
_OTHER_NONLINEAR = (
    "sigmoid",
    "exp",
    "exp2",
    "log",
    "log2",
    "log10",
    "log_sigmoid",
    "rsqrt",
    "reciprocal",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "cos",
    "cosh",
    "acos",
    "erfc",
    "logit",
    "softplus",
    "hardsigmoid",
    "clamp",
    "clip",
    "clamp_min",
    "clamp_max",
    "threshold",
    "atan2",
    "xlogy",
)


def _named(*names: str) -> tuple[str, ...]:
    return tuple(f"aten.{name}" for name in names)


def elementwise(operator: Operator, algebra: Algebra) -> Axes:
    """Couple all operands, axis by axis; one that gives its type alone is none."""
    (output, *_) = operator.outputs
    return algebra.broadcast(operator.sources, output.shape if output else ())


def nonlinear(operator: Operator, algebra: Algebra) -> Axes:
    """Couple likewise; the mark tells an FFN's width from a low-rank path."""
    axes = elementwise(operator, algebra)
    algebra.mark(axes, "nonlinear")
    return axes


rule(*_named(*_PRODUCTS), vanishes="any")(elementwise)
rule(*_named(*_SUMS), vanishes="all")(elementwise)
rule(*_named(*_CASTS), vanishes="first", moves=True)(elementwise)
rule(*_named(*_QUOTIENTS), vanishes="first")(elementwise)
rule(*_named(*_CHOICES, *_COMPARISONS))(elementwise)
rule(*_named(*_THROUGH_ZERO, "pow.Tensor_Scalar"), vanishes="first")(nonlinear)
rule(*_named(*_OTHER_NONLINEAR))(nonlinear)


@rule("aten.copy", vanishes="all")
def copy(operator: Operator, algebra: Algebra) -> Axes:
    """Write the source over the target."""
    target = operator["self"]
    return algebra.broadcast(operator.inputs, target.shape)


@rule("aten.prelu", vanishes="first")
def prelu(operator: Operator, algebra: Algebra) -> Axes:
    """Scale what is negative by one slope, or by one for each index of the second axis."""
    axes, slope = list(algebra[operator["self"]]), operator["weight"]
    if slope.shape not in ((), (1,)):
        algebra.same(axes[1], algebra[slope][0])
    algebra.mark(axes, "nonlinear")
    return axes


@rule("aten.glu", vanishes="first")
def gated(operator: Operator, algebra: Algebra) -> Axes:
    """Return a · sigmoid(b) for the halves a and b of an axis."""
    source = operator["self"]
    dim = operator["dim"] % len(source.shape)
    axes = list(algebra[source])
    half = source.shape[dim] // 2
    first, second = algebra.split(axes[dim], [half, half])
    algebra.same(first, second)
    axes[dim] = first
    algebra.mark([first], "nonlinear")
    return axes


@rule("aten.tril", "aten.triu", vanishes="first")
def triangle(operator: Operator, algebra: Algebra) -> Axes:
    """Keep one side of a diagonal: the last two axes have an order."""
    axes = algebra[operator["self"]]
    for axis in axes[-2:]:
        algebra.pin(axis, f"{operator.target} compares its units with those of another axis")
    return list(axes)
