"""Whether a file with packed weights computes what its float model computes on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from graphprune.certify.onnx_session import Arrays, OnnxSession
from graphprune.errors import VerificationError
from graphprune.export.check import Check
from graphprune.export.file_weights import file_weights
from graphprune.export.quantize_onnx import QuantizedOnnx
from graphprune.export.verify import TOLERANCE
from graphprune.export.verify_file import check_file
from graphprune.export.verify_weights import WEIGHT_TOLERANCE, relative_to_absmax, with_rounded_levels
from graphprune.shrink.onnx_weights import set_numbers
from graphprune.trace.onnx_reading import read_onnx

Weights = Mapping[str, npt.NDArray[np.float32]]
"""Dense weights (out, in), by initializer."""

_EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}


def with_weights(model: ir.Model, quantized: QuantizedOnnx, held: Weights | None = None) -> ir.Model:
    """Return a copy of a float model that holds what its packed weights stand for.

    Args:
        model: The float model that was quantized.
        quantized: What came of it.
        held: Other numbers for some of these weights.
    """
    dense = model.clone()
    for name, packed in quantized.packed.items():
        weight = (held or {}).get(name)
        weight = packed.quantized.dequantize().numpy() if weight is None else weight
        set_numbers(dense.graph.initializers[name], weight.T if packed.is_turned else weight)
    return dense


def measure_packed(
    path: Path, model: ir.Model, quantized: QuantizedOnnx, batches: Sequence[Arrays]
) -> list[Check]:
    """Compare a file with the float model that it was quantized from.

    1. The file is a valid model, its shapes agree, and its data is where and as long as it says.
    2. Its weights, read by the operators' published definitions alone, are the quantizer's, or in a layout that
       rounds them the quantizer's with rounded levels.
    3. With exact activations all outputs are those of the float model on these weights, in onnxruntime.
    4. As it is, its outputs are finite; how far they are from the float model's on the quantizer's weights is told.

    Args:
        path: The file.
        model: The float model.
        quantized: What became of its weights.
        batches: Inputs by name.

    Returns:
        The numbers, be they within their bounds or not.

    Raises:
        VerificationError: If the file is broken, or onnxruntime does not run it.
    """
    check_file(path)
    checks, held = _compare_weights(path, quantized)
    names = [str(value.name) for value in model.graph.outputs]
    exact = read_onnx(path)
    for node in exact.graph:
        node.attributes.pop("accuracy_level", None)
    found = _outputs(OnnxSession(exact, _EXACT), batches, names)
    expected = _outputs(OnnxSession(with_weights(model, quantized, held)), batches, names)
    checks.append(Check("outputs", distance(found, expected), TOLERANCE))
    shipped = _outputs(OnnxSession(read_onnx(path)), batches, names)
    finite = all(bool(np.isfinite(array).all()) for array in shipped)
    checks.append(Check("not_finite", float(not finite), 0.0))
    if held != {}:
        expected = _outputs(OnnxSession(with_weights(model, quantized)), batches, names)
    return [*checks, Check("rounding", distance(shipped, expected), None)]


def distance(found: Sequence[npt.NDArray[np.float32]], expected: Sequence[npt.NDArray[np.float32]]) -> float:
    """Return the largest difference of any output, over the largest number of that; infinite where shapes differ."""
    errors = [0.0]
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.size:
            scale = float(np.abs(other).max()) or 1.0
            errors.append(float(np.abs(one.astype(np.float64) - other).max()) / scale)
    return float(np.max(errors))


def _outputs(
    session: OnnxSession, batches: Sequence[Arrays], names: Sequence[str]
) -> list[npt.NDArray[np.float32]]:
    return [array for batch in batches for array in session.run(batch, names)]


def _compare_weights(
    path: Path, quantized: QuantizedOnnx
) -> tuple[list[Check], dict[str, npt.NDArray[np.float32]]]:
    """Return how far the file's weights are from the quantizer's, and those that a layout rounds."""
    errors, roundings = [0.0], [0.0]
    held: dict[str, npt.NDArray[np.float32]] = {}
    for label, found in file_weights(path):
        if label not in quantized.sources:
            continue  # packed before it came to us
        name = quantized.sources[label]
        packed, weight = quantized.packed[name].quantized, torch.from_numpy(np.asarray(found, np.float32))
        if tuple(weight.shape) != packed.shape:
            raise VerificationError(
                f"{path} holds a {tuple(weight.shape)} weight for {name}, which is {packed.shape}",
                "export it again",
            )
        error = relative_to_absmax(weight - packed.dequantize(), packed)
        roundings.append(error)
        if not error <= WEIGHT_TOLERANCE:
            held[name] = weight.numpy()
            error = relative_to_absmax(weight - with_rounded_levels(packed), packed)
        errors.append(error)
    checks = [
        Check("weights", float(np.max(errors)), WEIGHT_TOLERANCE),
        Check("weight_rounding", float(np.max(roundings)), None),
    ]
    return checks, held
