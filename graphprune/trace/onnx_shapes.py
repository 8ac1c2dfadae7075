"""Shapes of an ONNX model's values at example sizes, and the numbers that follow from sizes alone."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TypeProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from graphprune.errors import TraceError, TraceWarning
from graphprune.trace.onnx_contrib import SCHEMAS, ContribSchema
from graphprune.trace.onnx_sizes import ExampleSizes

# Numbers that are worked out on the way to a shape argument or a mask; anything larger is left to the operator.
_LARGEST = 1 << 16
# For sizes that depend on the inputs' numbers: each another, so that no two fit each other by chance.
_FIRST_STAND_IN = 1009
# What shape inference raises where a node's operands or attributes are not those of its operator.
_DO_NOT_FIT = (
    shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
)
# Whose result has the first operand's shape, which onnx itself can tell of a whole model only.
_ELEMENTWISE = {"GroupNormalization", "MeanVarianceNormalization"}


def fitted(model: ir.Model, sizes: ExampleSizes) -> ShapeInference:
    """Infer shapes at sizes that fit each other.

    Args:
        model: The model; functions inlined.
        sizes: To start from.

    Warns:
        TraceWarning: A node's result follows from known numbers, but could not be computed.
    """
    tried = [sizes]
    while True:
        shapes = ShapeInference(model, tried[-1])
        shapes.run()
        mended = tried[-1].mended(*shapes.conflict) if shapes.conflict else None
        if mended is None or mended in tried:
            shapes.warn_of_failures()
            return shapes
        tried.append(mended)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a value.

    Attributes:
        shape: None if not even its rank is known.
        dtype: Its element type.
        content: Its numbers, if they follow from sizes and small constants.
        certain: Whether its sizes are known; if not, `shape` holds stand-ins.
    """

    shape: tuple[int, ...] | None
    dtype: ir.DataType
    content: NDArray[Any] | None = None
    certain: bool = True


_UNKNOWN = Known(None, ir.DataType.UNDEFINED, certain=False)


class ShapeInference:
    """Walks a graph's nodes in order and finds out what is known of each result.

    Args:
        model: The model; functions inlined.
        sizes: A size for each symbol.
    """

    def __init__(self, model: ir.Model, sizes: ExampleSizes) -> None:
        self.known: dict[ir.Value, Known] = {}
        self.conflict: tuple[int, int] | None = None
        self._model = model
        self._sizes = sizes
        self._uncertain: set[ir.Node] = set()
        self._failures: dict[ir.Node, Exception] = {}
        self._stand_ins = itertools.count(_FIRST_STAND_IN, 2)
        self._opsets = {domain: version for domain, version in model.opset_imports.items() if version}

    def run(self) -> None:
        """Find out what is known of all values."""
        self.start()
        for node in self._model.graph:
            self.infer(node)

    def start(self) -> None:
        """Find out what is known of inputs and initializers."""
        for value in self._model.graph.inputs:
            self.known[value] = self._declared(value) or _UNKNOWN
        for value in self._model.graph.initializers.values():
            self.known[value] = known_of_tensor(value)

    def is_certain(self, node: ir.Node) -> bool:
        """Whether the shapes of a node's results follow from those of its operands."""
        return node not in self._uncertain

    def warn_of_failures(self) -> None:
        """Warn of each node whose result follows from known numbers, but could not be computed."""
        for node, error in self._failures.items():
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"the ONNX node '{node.name}' ({node.op_type}) could not be computed from its constant operands: "
                f"{reason}; sizes that follow from its result are taken as unknown",
                TraceWarning,
                stacklevel=2,
            )

    def infer(self, node: ir.Node) -> None:
        """Find out what is known of a node's results from what is known of its operands."""
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            self.known[node.outputs[0]] = known_of_tensor(node.outputs[0])
            return
        operands = [None if value is None else self.known.get(value, _UNKNOWN) for value in node.inputs]
        results: Sequence[Known | None] | None = None
        if all(operand is None or operand.shape is not None for operand in operands):
            results = self._folded(node, operands) or self._inferred(node, operands)
        for position, output in enumerate(node.outputs):
            found = results[position] if results and position < len(results) else None
            if found is None or not found.certain:
                found = self._declared(output) or found or _UNKNOWN
                if output.name and self.schema(node) is not None:
                    self._uncertain.add(node)
            self.known[output] = found

    def schema(self, node: ir.Node) -> defs.OpSchema | ContribSchema | None:
        """Return what is known of an operator, or None of a foreign one."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self._opsets.get(domain, defs.onnx_opset_version())
        if defs.has(node.op_type, max_inclusive_version=version, domain=domain):
            return defs.get_schema(node.op_type, max_inclusive_version=version, domain=domain)
        return SCHEMAS.get(node.op_type) if domain in ("", "com.microsoft") else None

    def _declared(self, value: ir.Value) -> Known | None:
        """Return what the file itself says of a value, at the example sizes."""
        if value.shape is None or value.dtype is None:
            return None
        found = [self._sizes.of(dim, f"{value.name}:{axis}") for axis, dim in enumerate(value.shape)]
        shape = tuple(size for size in found if size is not None)
        return Known(shape, value.dtype) if len(shape) == len(found) else None

    def _folded(self, node: ir.Node, operands: Sequence[Known | None]) -> list[Known | None] | None:
        """Work out results that follow from sizes and known numbers."""
        if node.op_type == "Shape" and node.domain == "" and operands[0] is not None and operands[0].certain:
            start = node.attributes.get_int("start", 0)
            end = node.attributes.get_int("end", None)
            return [_number(np.array((operands[0].shape or ())[start:end], np.int64))]
        schema = self.schema(node)
        given = [operand for operand in operands if operand is not None]
        if not isinstance(schema, defs.OpSchema) or any(operand.content is None for operand in given):
            return None
        subgraphs = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        if subgraphs or schema.node_determinism == defs.OpSchema.NodeDeterminism.NonDeterministic:
            return None
        sized = self._inferred(node, operands)
        if sized is None or any(one is not None and math.prod(one.shape or ()) > _LARGEST for one in sized):
            return None
        try:
            return _evaluated(node, operands, self._opsets)
        except Exception as error:  # onnx's reference code raises what numpy does, and its own errors
            self._failures[node] = error
            return None

    def _inferred(self, node: ir.Node, operands: Sequence[Known | None]) -> list[Known | None] | None:
        schema = self.schema(node)
        if schema is None or any(
            attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
        ):
            return None
        try:
            if isinstance(schema, ContribSchema):
                return _by_table(schema, node, operands)
            if schema.name in _ELEMENTWISE:
                return [operands[0] and replace(operands[0], content=None)]
            return self._by_onnx(schema, node, operands)
        except _DO_NOT_FIT:
            # Operands that do not fit: the sizes are wrong, or the file is. The operator is left opaque.
            self.conflict = self.conflict or _conflict(node, operands)
            return None

    def _by_onnx(
        self, schema: defs.OpSchema, node: ir.Node, operands: Sequence[Known | None]
    ) -> list[Known | None]:
        types: dict[str, TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for value, operand in zip(node.inputs, operands, strict=True):
            if value is None or operand is None or value.name is None:
                continue
            types[value.name] = helper.make_tensor_type_proto(int(operand.dtype), operand.shape)
            if operand.content is not None and operand.content.size <= 64:
                data[value.name] = numpy_helper.from_array(operand.content)
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        found = shape_inference.infer_node_outputs(schema, _proto(node), types, data, opset_imports=opsets)
        return [
            self._from_type(found[output.name]) if output.name in found else None for output in node.outputs
        ]

    def _from_type(self, found: TypeProto) -> Known | None:
        if not found.HasField("tensor_type") or not found.tensor_type.HasField("shape"):
            return None
        dims = found.tensor_type.shape.dim
        certain = all(dim.HasField("dim_value") for dim in dims)
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else next(self._stand_ins) for dim in dims)
        return Known(shape, ir.DataType(found.tensor_type.elem_type), certain=certain)


def known_of_tensor(value: ir.Value) -> Known:
    """Return what is known of an initializer or of a Constant node's result."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return _UNKNOWN
    shape = tuple(int(size) for size in tensor.shape.numpy())
    if tensor.size <= _LARGEST and _is_setting(tensor):
        return Known(shape, tensor.dtype, numbers_of(value.name or "", tensor))
    return Known(shape, tensor.dtype)


def _is_setting(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor says how to compute, such as a shape: whole numbers, booleans, scalars."""
    if tensor.dtype == ir.DataType.STRING:
        return False
    whole = tensor.dtype.is_integer() and tensor.dtype.bitwidth > 8
    return whole or tensor.dtype == ir.DataType.BOOL or tensor.size < 2


def numbers_of(name: str, tensor: ir.TensorProtocol) -> NDArray[Any]:
    """Return a tensor's numbers.

    Args:
        name: For the message.
        tensor: Maybe in a file beside the model.

    Raises:
        TraceError: If that file cannot be read, or the numbers are not as many as its shape says.
    """
    try:
        return tensor.numpy()
    except OSError as error:
        raise TraceError(
            f"the numbers of '{name}' lie in a file that cannot be read: {error}",
            "keep the model's external data beside its .onnx file",
        ) from error
    except (ValueError, TypeError) as error:
        raise TraceError(
            f"the numbers of '{name}' are not those of its shape: {str(error).splitlines()[0]}",
            "the file is damaged: export the model again",
        ) from error


def _proto(node: ir.Node) -> onnx.NodeProto:
    return ir.serde.serialize_node(node)


def _by_table(schema: ContribSchema, node: ir.Node, operands: Sequence[Known | None]) -> list[Known | None]:
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes["packed"] = operands[0] is not None and operands[0].dtype == ir.DataType.UINT8
    model = operands[schema.typed_like]
    shapes = schema.shapes([None if operand is None else operand.shape for operand in operands], attributes)
    return [Known(shape, model.dtype if model else ir.DataType.UNDEFINED) for shape in shapes]


def _evaluated(node: ir.Node, operands: Sequence[Known | None], opsets: dict[str, int]) -> list[Known | None]:
    """Run one node by onnx's own reference implementation."""
    names = [value.name for value in node.inputs if value is not None]
    graph = helper.make_graph(
        [_proto(node)],
        "node",
        [
            helper.make_tensor_value_info(value.name, int(operand.dtype), operand.shape)
            for value, operand in zip(node.inputs, operands, strict=True)
            if value is not None and operand is not None and value.name in names
        ],
        [onnx.ValueInfoProto(name=output.name) for output in node.outputs],
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    feeds = {
        value.name: operand.content
        for value, operand in zip(node.inputs, operands, strict=True)
        if value is not None and operand is not None
    }
    results = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports)).run(None, feeds)
    return [_number(np.asarray(result)) for result in results]


def _number(content: NDArray[Any]) -> Known:
    return Known(content.shape, ir.DataType.from_numpy(content.dtype), content)


def _conflict(node: ir.Node, operands: Sequence[Known | None]) -> tuple[int, int] | None:
    """Return the first two sizes that meet in a node, counted from the right as in broadcasting, and differ."""
    shapes = [operand.shape for operand in operands if operand is not None and operand.shape]
    axis = node.attributes.get_int("axis", None)
    skipped = None if axis is None or not shapes else axis - len(shapes[0]) if axis >= 0 else axis
    for distance in range(-1, -max((len(shape) for shape in shapes), default=0) - 1, -1):
        met = [shape[distance] for shape in shapes if len(shape) >= -distance and shape[distance] != 1]
        if distance != skipped and len(set(met)) > 1:
            return met[0], next(size for size in met if size != met[0])
    return None
