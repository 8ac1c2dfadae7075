"""The ONNX front end: a model file, or a model in memory, lowered to an operator graph."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import AttributeProto, defs, helper
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import InlinePass

from graphprune.errors import TraceError
from graphprune.trace.graph import Argument, Operator, OperatorGraph, Role, Value
from graphprune.trace.onnx_contrib import ContribSchema
from graphprune.trace.onnx_reading import check_order, read_onnx
from graphprune.trace.onnx_roles import role_of
from graphprune.trace.onnx_sequences import without_sequences
from graphprune.trace.onnx_shapes import ShapeInference, fitted
from graphprune.trace.onnx_sizes import example_sizes
from graphprune.trace.onnx_states import states_of

# Where the torch exporter writes down which module a node comes from.
_MODULE_PATH = "pkg.torch.onnx.name_scopes"
_SMALL = 4096


def trace_onnx(model: str | Path | ir.Model, sizes: Mapping[str, int] | None = None) -> OperatorGraph:
    """Lower an ONNX model to an operator graph.

    Only the graph is read: weights in external data stay on disk. Model-local functions are inlined; what follows
    from sizes alone (shape arguments, masks) is worked out and stands in the graph as constants; operators with
    subgraphs, and such whose shapes cannot be told, are opaque to the analysis.

    Args:
        model: A path, or a model in memory, which is not changed.
        sizes: Sizes for the symbolic dimensions of the inputs, by symbol (an unnamed one is ``input:axis``); by
            default some that collide with no other size in the model.

    Returns:
        The operator graph, parameters under the names that the file gives them. It keeps the `onnx_ir.Model`.

    Raises:
        TraceError: If there is no such file, it is no ONNX model, one that contradicts itself, or `sizes` names an
            unknown symbol.
    """
    opened = open_onnx(model)
    chosen = example_sizes(opened, dict(sizes or {}))
    shapes = fitted(opened, chosen)
    return _Lowering(opened, shapes, fitted(opened, chosen.others())).graph()


def open_onnx(model: str | Path | ir.Model) -> ir.Model:
    """Return a model as it is traced: model-local functions inlined, splits without sequences.

    Args:
        model: A path, or a model in memory, which is not changed.

    Raises:
        TraceError: If there is no such file, it is no ONNX model, or one that contradicts itself.
    """
    opened = model if isinstance(model, ir.Model) else read_onnx(Path(model))
    check_order(opened)
    return without_sequences(_inlined(opened))


def _inlined(model: ir.Model) -> ir.Model:
    if not model.functions:
        return model
    try:
        return InlinePass()(model.clone()).model
    except (PreconditionError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise TraceError(
            f"the functions of the model cannot be inlined: {str(cause).splitlines()[0]}",
            "a function may not call itself: export the model again",
        ) from error


def named_nodes(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """Yield a graph's nodes in order, with the names that their operators have: a node's own if no other has it."""
    names: set[str] = set()
    for position, node in enumerate(graph):
        name = node.name if node.name and node.name not in names else f"{node.op_type}#{position}"
        names.add(name)
        yield name, node


class _Lowering:
    """Turns the nodes of a model whose shapes are known into operators.

    Args:
        model: The model.
        shapes: What is known of its values.
        at_other_sizes: The same at other sizes of the symbols; numbers that differ follow from the inputs' sizes.
    """

    def __init__(self, model: ir.Model, shapes: ShapeInference, at_other_sizes: ShapeInference) -> None:
        self._model = model
        self._shapes = shapes
        self._at_other_sizes = at_other_sizes
        self._values: dict[ir.Value, Value] = {}

    def graph(self) -> OperatorGraph:
        """Return the operator graph."""
        graph = self._model.graph
        inputs = [value for value in graph.inputs if value.name not in graph.initializers]
        for value in inputs:
            self._add(value, "input")
        for value in graph.initializers.values():
            self._add(value, role_of(value))
        operators = []
        for name, node in named_nodes(graph):
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                self._add(node.outputs[0], role_of(node.outputs[0]))
            elif node.outputs and all(
                self._shapes.known[output].content is not None for output in node.outputs
            ):
                for output in node.outputs:
                    self._add(output, "constant")
            else:
                operators.append(self._operator(name, node))
        return OperatorGraph(
            operators=tuple(operators),
            inputs=tuple(self._values[value] for value in inputs),
            weights={value.name: value for value in self._values.values() if value.is_weight},
            outputs=tuple(self._values[value] for value in graph.outputs),
            program=self._model,
            states=tuple((past.name or "", present.name or "") for past, present in states_of(graph)),
        )

    def _add(self, value: ir.Value, role: Role) -> Value:
        known = self._shapes.known[value]
        dtype = str(known.dtype.numpy()) if known.dtype != ir.DataType.UNDEFINED else "unknown"
        self._values[value] = Value(value.name or "", known.shape or (), dtype, role, self._content(value))
        return self._values[value]

    def _content(self, value: ir.Value) -> NDArray[np.int64] | None:
        """Return a few whole numbers that are the same whatever the inputs' sizes."""
        numbers, others = self._shapes.known[value].content, self._at_other_sizes.known[value].content
        if (
            numbers is None
            or others is None
            or numbers.size > _SMALL
            or not np.issubdtype(numbers.dtype, np.integer)
        ):
            return None
        return numbers.astype(np.int64) if np.array_equal(numbers, others) else None

    def _operator(self, name: str, node: ir.Node) -> Operator:
        domain = node.domain if node.domain not in ("", "ai.onnx") else "onnx"
        target = f"{domain}.{node.op_type}"
        if not self._shapes.is_certain(node):
            target += " (shapes unknown)"
        outputs = tuple(self._add(value, "intermediate") if value.name else None for value in node.outputs)
        return Operator(name, target, self._arguments(node), outputs, _module(node))

    def _arguments(self, node: ir.Node) -> dict[str, Argument]:
        """Return operands and attributes by the names that the operator's schema gives them."""
        schema = self._shapes.schema(node)
        operands = [None if value is None else self._values.get(value) for value in node.inputs]
        named = _named(schema, operands)
        if isinstance(schema, defs.OpSchema):
            for name, attribute in schema.attributes.items():
                if attribute.default_value.type != AttributeProto.UNDEFINED:
                    named[name] = _plain(helper.get_attribute_value(attribute.default_value))
        for name, given in node.attributes.items():
            if given.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                named[name] = tuple(self._captured(node))
            else:
                named[name] = _plain(given.value)
        return named

    def _captured(self, node: ir.Node) -> Iterator[Value]:
        """Yield the values of the graph that a node's subgraphs read."""
        yield from (self._values[value] for value in subgraph_values(node) if value in self._values)


def subgraph_values(node: ir.Node) -> Iterator[ir.Value]:
    """Yield each value that a node's subgraphs read, their own included."""
    subgraphs = [
        graph
        for attribute in node.attributes.values()
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for graph in (attribute.value if isinstance(attribute.value, (list, tuple)) else [attribute.value])
    ]
    read = dict.fromkeys(
        value
        for graph in subgraphs
        for value in (
            *(value for inner in ir.traversal.RecursiveGraphIterator(graph) for value in inner.inputs),
            *graph.outputs,
        )
    )
    yield from (value for value in read if value is not None)


def _named(
    schema: defs.OpSchema | ContribSchema | None, operands: Sequence[Value | None]
) -> dict[str, Argument]:
    if schema is None:
        return {f"input_{position}": operand for position, operand in enumerate(operands)}
    if isinstance(schema, ContribSchema):
        return dict(itertools.zip_longest(schema.inputs, operands))
    named: dict[str, Argument] = {}
    for position, formal in enumerate(schema.inputs):
        if formal.option == defs.OpSchema.FormalParameterOption.Variadic:
            named[formal.name] = tuple(operands[position:])
        else:
            named[formal.name] = operands[position] if position < len(operands) else None
    return named


def _plain(content: Any) -> Argument:
    """Return an attribute as an argument; tensors and types say nothing to a rule."""
    if isinstance(content, bytes):
        return content.decode("utf-8", "replace")
    if isinstance(content, (int, float, str)):
        return content
    if isinstance(content, (list, tuple)):
        return tuple(_plain(item) for item in content)
    return None


def _module(node: ir.Node) -> str:
    """Return the path of the module whose forward made the node, as the torch exporter notes it."""
    try:
        path = ast.literal_eval(node.metadata_props.get(_MODULE_PATH, "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(path[-2]) if isinstance(path, list) and len(path) > 1 else ""
