"""Element-wise operators of ONNX."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.elementwise import elementwise, nonlinear, triangle
from graphprune.coupling.rules.onnx_reshaping import asking
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator

_SUMS = "Add Sub Sum Mean Where"
_QUOTIENTS = "Div Neg"
_COMPARISONS = (
    "And Or Not Xor Equal Greater GreaterOrEqual Less LessOrEqual Min Max IsNaN IsInf Mod "
    "BitwiseAnd BitwiseOr BitwiseNot BitwiseXor BitShift"
)
_THROUGH_ZERO = (
    "Abs Relu Tanh Sqrt Pow Erf Gelu Swish Mish Softsign LeakyRelu PRelu Elu Selu Celu HardSwish "
    "ThresholdedRelu Shrink Sign Floor Ceil Round Sin Tan Sinh Asin Atan"
)
_OTHER_NONLINEAR = "Sigmoid Exp Log Reciprocal Softplus HardSigmoid Clip Cos Cosh Acos"


def _named(names: str, domain: str = "onnx") -> tuple[str, ...]:
    return tuple(f"{domain}.{name}" for name in names.split())


rule("onnx.Mul", vanishes="any")(elementwise)
rule(*_named(_SUMS), vanishes="all")(elementwise)
rule(*_named(_QUOTIENTS), vanishes="first")(elementwise)
rule(*_named(_COMPARISONS))(elementwise)
rule(*_named(_THROUGH_ZERO), *_named("QuickGelu Gelu", "com.microsoft"), vanishes="first")(nonlinear)
rule(*_named("FastGelu BiasGelu", "com.microsoft"), vanishes="all")(nonlinear)
rule(*_named(_OTHER_NONLINEAR))(nonlinear)


@rule("onnx.Identity", "onnx.Cast", "onnx.CastLike", "onnx.Dropout", vanishes="first", moves=True)
def pass_on(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Return the first operand as it is; of `CastLike`'s other one only the type matters."""
    return tuple(list(algebra[operator.inputs[0]]) for _ in operator.outputs)


@rule("onnx.Trilu", vanishes="first")
def trilu(operator: Operator, algebra: Algebra) -> Axes:
    """Keep one side of a diagonal."""
    return triangle(asking(operator, self=operator["input"]), algebra)
