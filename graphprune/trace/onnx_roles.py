"""What an initializer is: a file does not say whether its numbers were learned, only how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from graphprune.trace.graph import Role

Reading = Callable[[ir.Node, int], bool]

# Operands that are not learned, by operator and position.
_STATISTICS = {("BatchNormalization", 3), ("BatchNormalization", 4)}
_TABLES = {
    ("", "RotaryEmbedding"): (1, 2),
    ("com.microsoft", "RotaryEmbedding"): (2, 3),
    ("com.microsoft", "GroupQueryAttention"): (7, 8),
    ("", "Attention"): (3,),
}
_SETTINGS = {("Resize", 1), ("Resize", 2), ("Pad", 2), ("Clip", 1), ("Clip", 2)}
_WAVES = {"Cos", "Sin"}
# Operators through which a table's numbers are still the table's.
_PASSING = {"Reshape", "Unsqueeze", "Squeeze", "Expand", "Cast", "Transpose", "Concat", "Slice", "Neg"}
_GATHERING = {*_PASSING, "Gather"}
_PHASES = {*_PASSING, "Mul", "MatMul", "Einsum"}


def role_of(value: ir.Value) -> Role:
    """Return what an initializer, or the result of a Constant node, is.

    - ``parameter``: floating numbers, and codes of at most 8 bits; at least two of them;
    - ``buffer``: such that are not learned but measured or chosen: a normalisation's statistics, and the
      frequencies of which only sines and cosines are taken;
    - ``constant``: what the exporter worked out: cosines, sines and masks as tables; whole numbers; scalars.
    """
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size < 2 or not (_is_code(tensor.dtype) or tensor.dtype.is_floating_point()):
        return "constant"
    uses = list(_uses(value))
    if uses and all((node.op_type, position) in _SETTINGS for node, position in uses):
        return "constant"
    if uses and all((node.op_type, position) in _STATISTICS for node, position in uses):
        return "buffer"
    if tensor.dtype.is_floating_point() and _becomes(value, _PHASES, _is_wave):
        return "buffer"
    several = sum(size != 1 for size in tensor.shape.numpy()) > 1
    if several and (_becomes(value, _PASSING, _is_worked_out) or _becomes(value, _GATHERING, _is_table)):
        return "constant"
    return "parameter"


def _is_code(dtype: ir.DataType) -> bool:
    return dtype.is_integer() and dtype.bitwidth <= 8


def _is_wave(node: ir.Node, position: int) -> bool:
    return node.op_type in _WAVES


def _is_table(node: ir.Node, position: int) -> bool:
    """Whether an operator reads cosines, sines or a mask there."""
    return position in _TABLES.get((node.domain, node.op_type), ())


def _is_worked_out(node: ir.Node, position: int) -> bool:
    """Whether an operator reads folded cosines, sines or mask entries there."""
    if node.op_type == "Mul":  # activations times several axes of numbers: a learned factor has one axis
        other = node.inputs[1 - position]
        return other is not None and ir.convenience.get_const_tensor(other) is None
    return node.op_type == "Add" and all(
        reader.op_type == "Softmax" for output in node.outputs for reader, _ in _uses(output)
    )


def _becomes(value: ir.Value, passing: set[str], end: Reading) -> bool:
    """Whether all that is made of a value, through operators that pass it on, is read by an operator of `end`."""
    pending, seen = [value], {value}
    while pending:
        uses = list(_uses(pending.pop()))
        if not uses:
            return False
        for node, position in uses:
            if end(node, position):
                continue
            if node.op_type not in passing:
                return False
            pending += [output for output in node.outputs if output not in seen]
            seen.update(node.outputs)
    return True


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    for use in value.uses():
        yield use.node, use.idx
