"""Element-wise operators of ONNX."""

from __future__ import annotations

from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.rules.elementwise import elementwise, nonlinear
from graphprune.coupling.rules.registry import rule
from graphprune.trace.graph import Operator

_LINEAR = "Add Sub Mul Div Neg Where Sum Mean"
_COMPARISONS = (
    "And Or Not Xor Equal Greater GreaterOrEqual Less LessOrEqual Min Max IsNaN IsInf Sign Floor Ceil Round Mod "
    "BitwiseAnd BitwiseOr BitwiseNot BitwiseXor BitShift"
)
_NONLINEAR = (
    "Abs Relu Sigmoid Tanh Exp Log Sqrt Reciprocal Pow Erf Gelu Swish Mish Softplus Softsign LeakyRelu PRelu Elu "
    "Selu Celu HardSigmoid HardSwish ThresholdedRelu Shrink Clip Sin Cos Tan Sinh Cosh Asin Acos Atan"
)
_FUSED = "QuickGelu FastGelu BiasGelu Gelu"

rule(*(f"onnx.{name}" for name in f"{_LINEAR} {_COMPARISONS}".split()))(elementwise)
rule(*(f"onnx.{name}" for name in _NONLINEAR.split()), *(f"com.microsoft.{name}" for name in _FUSED.split()))(
    nonlinear
)


@rule("onnx.Identity", "onnx.Cast", "onnx.CastLike", "onnx.Dropout")
def pass_on(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Return the first operand as it is; of `CastLike`'s other one only the type matters."""
    source = operator.inputs[0]
    return tuple(algebra.view(output, source, range(len(source.shape))) for output in operator.outputs)
