"""Which products of a traced graph have a weight for their second operand, and in which orientation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from graphprune.export.grouped_products import GROUPED
from graphprune.export.stand_ins import DOMAIN, WEIGHT


@dataclass(frozen=True, slots=True)
class WeightOperand:
    """A weight, or a matrix of it, as a product reads it.

    Attributes:
        module: Name of the module that holds it.
        flipped: Whether the last two axes are exchanged.
        index: Which matrix of a stack; None for the whole weight.
    """

    module: str
    flipped: bool = False
    index: int | None = None


def second_operand(node: ir.Node) -> WeightOperand | None:
    """Return the weight that a product multiplies by, as its (in, out) is read; None if it is another node."""
    if node.op_type == "MatMul" or (node.domain == DOMAIN and node.op_type == GROUPED):
        return _read(node.inputs[1])
    if node.op_type == "Gemm" and not _integer(node, "transA") and _plain(node):
        found = _read(node.inputs[1])
        if found is not None and _integer(node, "transB"):
            return replace(found, flipped=not found.flipped)
        return found
    return None


def _read(value: ir.Value | None) -> WeightOperand | None:
    producer = None if value is None else value.producer()
    if producer is None:
        return None
    if producer.domain == DOMAIN and producer.op_type == WEIGHT:
        return WeightOperand(producer.attributes["module"].as_string())
    source = _read(producer.inputs[0]) if producer.op_type in ("Transpose", "Gather") else None
    if source is None:
        return None
    if producer.op_type == "Transpose":
        return replace(source, flipped=not source.flipped) if _exchanges_last_two(producer) else None
    index = None if producer.inputs[1] is None else producer.inputs[1].const_value
    first = _integer(producer, "axis") == 0 and index is not None and index.shape.rank() == 0
    if not first or index is None or source.index is not None:
        return None
    return replace(source, index=int(index.numpy()))


def _exchanges_last_two(transpose: ir.Node) -> bool:
    order = list(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else [1, 0]
    rank = len(order)
    return order == [*range(rank - 2), rank - 1, rank - 2]


def _plain(gemm: ir.Node) -> bool:
    return all(
        gemm.attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in gemm.attributes
    )


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0
