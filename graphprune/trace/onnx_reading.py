"""A file opened as an ONNX model, of which nothing is believed before it is checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from graphprune.errors import TraceError

_EXPORT_AGAIN = "the file is damaged, or no exporter made it: export it again"


def read_onnx(path: Path) -> ir.Model:
    """Return the model in a file; weights in external data stay on disk, in files beside or below it only.

    Raises:
        TraceError: If there is no such file, it is no ONNX model, or one that contradicts itself.
    """
    if not path.is_file():
        raise TraceError(f"there is no file '{path}'", "give the path of a .onnx file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, TypeError, AttributeError) as error:
        raise _no_model(path, error) from error
    if not proto.opset_import:
        raise TraceError(f"'{path}' is not an ONNX model: it names no operator set", "export it again")
    _check_initializers(proto.graph)
    for tensor in proto.graph.initializer:
        check_external(path, tensor)
    try:
        model = ir.serde.deserialize_model(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise _no_model(path, error) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def check_order(model: ir.Model) -> None:
    """Check that every value that a node reads, or the model returns, is there before.

    Raises:
        TraceError: With the node and the value.
    """
    pending: list[tuple[ir.Graph, frozenset[ir.Value]]] = [(model.graph, frozenset())]
    while pending:
        graph, outer = pending.pop()
        known = {*outer, *graph.inputs, *graph.initializers.values()}
        for node in graph:
            for value in node.inputs:
                if value is not None and value not in known:
                    raise TraceError(
                        f"the ONNX node '{node.name}' ({node.op_type}) reads '{value.name}', which nothing makes "
                        "before it: the graph has a cycle, lacks a node, or is out of order",
                        _EXPORT_AGAIN,
                    )
            pending += [(inner, frozenset(known)) for inner in _subgraphs(node)]
            known.update(node.outputs)
        for value in graph.outputs:
            if value not in known:
                raise TraceError(f"nothing makes the output '{value.name}'", _EXPORT_AGAIN)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.value


def _check_initializers(graph: onnx.GraphProto) -> None:
    """Check that names are given once, and that numbers are as many as the shapes say."""
    names: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in names:
            raise TraceError(f"there are two initializers '{tensor.name}'", _EXPORT_AGAIN)
        names.add(tensor.name)
        if any(size < 0 for size in tensor.dims):
            raise TraceError(
                f"the initializer '{tensor.name}' has the shape {list(tensor.dims)}", _EXPORT_AGAIN
            )
        if tensor.HasField("raw_data") and tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_length(tensor, len(tensor.raw_data))


def check_external(path: Path, tensor: onnx.TensorProto, *, present: bool = False) -> None:
    """Check that a tensor's numbers lie beside the file, and are as many as its shape says.

    Args:
        path: The model's file.
        tensor: Any of its tensors; one whose numbers are in the file itself passes.
        present: Whether the file with the numbers has to be there already.

    Raises:
        TraceError: If not.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    held = (folder / location).resolve()
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute()
    if not location or absolute or not held.is_relative_to(folder):
        raise TraceError(
            f"the numbers of '{tensor.name}' are said to lie in '{location}', which is not beside the model's file",
            "put the external data into the model's folder, and no links to elsewhere",
        )
    try:
        offset, length = (int(entries.get(key) or 0) for key in ("offset", "length"))
    except ValueError as error:
        raise TraceError(f"the external data of '{tensor.name}': {error}", _EXPORT_AGAIN) from error
    if "length" in entries:
        _check_length(tensor, length)
    size = offset + _bytes(tensor)
    if offset < 0 or (held.is_file() and size > held.stat().st_size) or (present and not held.is_file()):
        raise TraceError(
            f"the numbers of '{tensor.name}' are said to be bytes {offset} to {size} of '{location}', which has "
            f"{held.stat().st_size if held.is_file() else 'none'}",
            "the file was cut off, or belongs to another model: copy both again",
        )


def _check_length(tensor: onnx.TensorProto, length: int) -> None:
    if length != _bytes(tensor):
        raise TraceError(
            f"the initializer '{tensor.name}' of shape {list(tensor.dims)} has {length} bytes, not {_bytes(tensor)}",
            _EXPORT_AGAIN,
        )


def _bytes(tensor: onnx.TensorProto) -> int:
    """Return how many bytes the numbers of a tensor take.

    Raises:
        TraceError: If there is no such type.
    """
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise TraceError(f"the initializer '{tensor.name}': {error}", _EXPORT_AGAIN) from error
    return math.ceil(math.prod(tensor.dims) * bits / 8)


def _no_model(path: Path, error: Exception) -> TraceError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return TraceError(f"'{path}' is not an ONNX model: {reason}", "give the path of a .onnx file")
