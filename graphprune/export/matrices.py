"""The matrices of an ONNX graph that packed weights can take the place of, and why others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphprune.trace.onnx_roles import role_of
from graphprune.trace.onnx_shapes import ShapeInference, fitted
from graphprune.trace.onnx_sizes import example_sizes


@dataclass(frozen=True, slots=True)
class Matrix:
    """A float32 initializer that all of its readers can have packed.

    Attributes:
        value: The initializer, (out, in) or (in, out).
        is_turned: Whether it is stored as (in, out), and packed as its transpose.
        readers: Nodes that multiply with it, or look its rows up.
    """

    value: ir.Value
    is_turned: bool
    readers: tuple[ir.Node, ...]

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up in it; a head that is tied to an embedding is such a table too."""
        return any(node.op_type == "Gather" for node in self.readers)


def find_matrices(model: ir.Model) -> tuple[list[Matrix], dict[str, str]]:
    """Return the matrices of a model that can be packed, and for each other weight of two axes or more why not.

    A reader may see a matrix through Transpose and Identity nodes. Values that are multiplied with one get a shape,
    of their rank alone, if they have none.

    Args:
        model: The model, functions inlined.
    """
    shapes = fitted(model, example_sizes(model, {}))
    found: list[Matrix] = []
    reasons: dict[str, str] = {}
    for name, value in model.graph.initializers.items():
        axes = len(shapes.known[value].shape or ())
        if axes < 2 or role_of(value) != "parameter":
            continue
        matrix = _matrix(model.graph, value, axes, shapes)
        if isinstance(matrix, Matrix):
            found.append(matrix)
        else:
            reasons[name] = matrix
    return found, reasons


def _matrix(graph: ir.Graph, value: ir.Value, axes: int, shapes: ShapeInference) -> Matrix | str:
    if axes != 2:
        return f"it has {axes} axes"
    if value.dtype != ir.DataType.FLOAT:
        return f"its numbers are {value.dtype}, and packed weights compute in float32"
    if value in graph.inputs:
        return "a session may be given other numbers for it"
    ways: set[bool] = set()
    readers = list(_readers(value))
    for node, position, seen_turned in readers:
        if node is None or node.graph is not graph:
            return "the file returns it" if node is None else "a subgraph reads it"
        way = _way(node, position, seen_turned, shapes)
        if isinstance(way, str):
            return way
        ways.add(way)
    if len(ways) != 1:
        return "some operators read its rows and others its columns" if ways else "nothing reads it"
    return Matrix(value, ways.pop(), tuple(dict.fromkeys(node for node, _, _ in readers if node is not None)))


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node | None, int, bool]]:
    """Yield who reads a value, at which position, and whether turned; None stands for the file's output."""
    pending = [(value, False)]
    while pending:
        seen, is_turned = pending.pop()
        if seen.is_graph_output():
            yield None, 0, is_turned
        for node, position in seen.uses():
            if _is_standard(node) and node.op_type == "Identity":
                pending.append((node.outputs[0], is_turned))
            elif _is_standard(node) and node.op_type == "Transpose":
                order = node.attributes.get_ints("perm", [1, 0])
                pending.append((node.outputs[0], is_turned != (list(order) == [1, 0])))
            else:
                yield node, position, is_turned


def _way(node: ir.Node, position: int, seen_turned: bool, shapes: ShapeInference) -> bool | str:
    """Return whether a node wants the initializer's transpose packed as (out, in), or why it cannot have it packed."""
    if _is_standard(node) and node.op_type == "MatMul" and position == 1:
        return _ranked(node, node.inputs[0], shapes, 2) or not seen_turned
    if _is_standard(node) and node.op_type == "Gemm" and position == 1:
        return _way_of_gemm(node, seen_turned, shapes)
    if _is_standard(node) and node.op_type == "Gather" and position == 0:
        if node.attributes.get_int("axis", 0) not in (0, -2):
            return f"Gather '{node.name}' looks its columns up"
        ids = node.inputs[1]
        known = shapes.known[ids].shape if ids is not None else None
        return seen_turned if len(known or ()) == 2 else f"Gather '{node.name}' looks up one list of rows"
    return f"{node.op_type} '{node.name}' reads it"


def _way_of_gemm(node: ir.Node, seen_turned: bool, shapes: ShapeInference) -> bool | str:
    has_addend = len(node.inputs) > 2 and node.inputs[2] is not None
    scaled = node.attributes.get_float("alpha", 1.0) != 1 or (
        has_addend and node.attributes.get_float("beta", 1.0) != 1
    )
    turns = {name: node.attributes.get_int(name, 0) for name in ("transA", "transB")}
    if scaled or turns["transA"]:
        return f"Gemm '{node.name}' scales the product, or turns what it multiplies"
    return _ranked(node, node.inputs[0], shapes, 2) or (seen_turned if turns["transB"] else not seen_turned)


def _ranked(node: ir.Node, factor: ir.Value | None, shapes: ShapeInference, least: int) -> str:
    """Give a factor a shape if it has none; return what is wrong if its rank is not known, or too small."""
    known = shapes.known[factor].shape if factor is not None else None
    if factor is None or known is None or len(known) < least:
        return f"what {node.op_type} '{node.name}' multiplies with it is no matrix, or of unknown rank"
    if factor.shape is None:
        factor.shape = ir.Shape([None] * len(known))
    return ""


def _is_standard(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx")
