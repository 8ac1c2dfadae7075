"""Whether an ONNX file is sound by itself: valid, of one mind about shapes, its data in place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from graphprune.errors import VerificationError

_REMEDY = "keep the file and its data together as they were written, or export it again"


def check_file(path: Path) -> None:
    """Check a file without running it: ONNX's full check, strict shape inference, the data of its tensors.

    Raises:
        VerificationError: With the first fault.
    """
    with _clear_errors(path):
        onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_data(path, tensor)
    with _clear_errors(path):
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        reason = str(err).strip().split("\n")[0]
        raise VerificationError(f"{path} is not a valid ONNX model: {reason}", _REMEDY) from err


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _check_data(path: Path, tensor: onnx.TensorProto) -> None:
    """Check that a tensor's data lies beside the file, within the data's end, and is as long as its shape says."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    needed = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)
    data = path.parent / entries.get("location", "")
    offset, length = (entries.get(key, str(usual)) for key, usual in (("offset", 0), ("length", needed)))
    if not data.resolve().is_relative_to(path.parent.resolve()) or not data.is_file():
        raise _fault(
            path, tensor, f"keeps its data in '{entries.get('location')}', which is not beside the file"
        )
    if not offset.isdecimal() or length != str(needed):
        words = f"{length} are declared, from byte {offset}"
        raise _fault(path, tensor, f"of shape {list(tensor.dims)} takes {needed} bytes, and {words}")
    if int(offset) + needed > data.stat().st_size:
        raise _fault(
            path, tensor, f"ends at byte {int(offset) + needed} of {data.stat().st_size} in {data.name}"
        )


def _fault(path: Path, tensor: onnx.TensorProto, reason: str) -> VerificationError:
    return VerificationError(f"{path} is not a valid ONNX model: tensor {tensor.name} {reason}", _REMEDY)
