"""Whether an ONNX file is sound by itself: valid, of one mind about shapes, its data in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from graphprune.errors import TraceError, VerificationError
from graphprune.trace.onnx_reading import check_external

_REMEDY = "keep the file and its data together as they were written, or export it again"


def check_file(path: Path) -> None:
    """Check a file without running it: ONNX's full check, strict shape inference, the data of its tensors.

    Raises:
        VerificationError: With the first fault.
    """
    with _clear_errors(path):
        onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    with _clear_errors(path):
        for tensor in _tensors(model.graph):
            check_external(path, tensor, present=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        reason = str(err).strip().split("\n")[0]
        raise VerificationError(f"{path} is not a valid ONNX model: {reason}", _REMEDY) from err
    except TraceError as err:
        raise VerificationError(f"{path} is not a valid ONNX model: {err.problem}", _REMEDY) from err


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
