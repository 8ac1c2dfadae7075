"""An ONNX model with its matrices in low bits, made from the file alone; no module is built."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphprune.errors import ExportError, QuantizationError
from graphprune.export.embeddings import write_embedding
from graphprune.export.graph_writer import MICROSOFT, GraphWriter
from graphprune.export.layouts import LAYOUTS, Layout, Profile, check_profile, choose_layout
from graphprune.export.matrices import Matrix, find_matrices
from graphprune.export.packed_matrix import PackedMatrix
from graphprune.trace.onnx import open_onnx
from graphprune.trace.onnx_shapes import numbers_of
from quant import QuantizedTensor, get_format, quantize
from quant.config import as_expressions, check_expressions
from quant.errors import QuantError
from quant.scales import Storage

OLDEST_OPSET = 18
"""Of the operators that unpack codes."""
_OPSET_OF_BLOCKS = 21
"""Since then DequantizeLinear takes blocks."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """What became of one initializer.

    Attributes:
        quantized: Its codes and scales, (out, in).
        is_turned: Whether the initializer was (in, out).
        error: Relative error of the weight in the Frobenius norm.
    """

    quantized: QuantizedTensor
    is_turned: bool
    error: float


@dataclass(frozen=True, slots=True)
class QuantizedOnnx:
    """What came of it.

    Attributes:
        model: The model with packed weights.
        packed: By the initializer's name.
        left: Weights of two axes or more that stay as they are, with the reason.
        sources: For each operator that reads a packed weight, by what its nodes' names begin with, the initializer.
    """

    model: ir.Model
    packed: Mapping[str, PackedWeight]
    left: Mapping[str, str]
    sources: Mapping[str, str]


def quantize_onnx(
    model: str | Path | ir.Model,
    *,
    format: str | int = "nf4",
    block_size: int = 64,
    scale_storage: Storage = "float32",
    embedding_format: str | int | None = "int8",
    embedding_block_size: int = 32,
    exclude: str | Sequence[str] = (),
    profile: Profile = "cpu",
    exact: bool = False,
) -> QuantizedOnnx:
    """Quantize the matrices of an ONNX model: constants that MatMul and Gemm multiply with, and that Gather looks up.

    Args:
        model: The path of a file, or a model in memory, which is not changed.
        format: Of the matrices: a name of `quant.format_names()`, or a number of bits.
        block_size: Consecutive weights of a matrix (out, in) that share a scale.
        scale_storage: How scales are stored: "float32", "float16" or "double" (quantized too).
        embedding_format: Of tables that rows are looked up in, and of heads tied to them; None leaves them.
        embedding_block_size: Of these.
        exclude: Regular expressions; an initializer in whose name one is found stays as it is.
        profile: What the model is to run on: "cpu", "cuda" or "portable".
        exact: Hold the quantized weights without rounding; see `export_onnx`.

    Raises:
        TraceError: If there is no such file, or it is no sound ONNX model.
        QuantizationError: If a setting is wrong, or a weight is not finite.
        ExportError: If there is no such profile, or the model's operators are older than those of packed weights.
    """
    check_profile(profile)
    packed = open_onnx(model).clone()
    opset = _opset(packed)
    try:
        exclude = as_expressions(exclude)
        check_expressions(exclude)
        for name in (format, embedding_format):
            if name is not None:
                get_format(name)
        matrices, left = find_matrices(packed)
        formats = {True: (embedding_format, embedding_block_size), False: (format, block_size)}
        weights: dict[str, tuple[Matrix, PackedWeight]] = {}
        for matrix in matrices:
            name, (chosen, block) = str(matrix.value.name), formats[matrix.is_table]
            if any(re.search(expression, name) for expression in exclude) or chosen is None:
                left[name] = "it was excluded" if chosen is not None else "tables have no format"
            else:
                weights[name] = matrix, _quantized(matrix, chosen, block, scale_storage)
    except QuantError as error:
        raise QuantizationError(error.problem, error.remedy) from error
    sources = _write(packed, weights, lambda weight: _layout(weight, profile, exact, opset), profile)
    return QuantizedOnnx(packed, {name: weight for name, (_, weight) in weights.items()}, left, sources)


def _opset(model: ir.Model) -> int:
    opset = model.opset_imports.get("") or model.opset_imports.get("ai.onnx") or 0
    if opset < OLDEST_OPSET:
        raise ExportError(
            f"the model's operators are of opset {opset}, and packed weights take {OLDEST_OPSET}",
            f"export it again with opset {OLDEST_OPSET} or later, or convert it: onnx.version_converter",
        )
    return opset


def _quantized(matrix: Matrix, format: str | int, block_size: int, storage: Storage) -> PackedWeight:
    name = str(matrix.value.name)
    tensor = matrix.value.const_value
    numbers = np.empty((0, 0)) if tensor is None else numbers_of(name, tensor)
    weight = torch.from_numpy(np.array(numbers.T if matrix.is_turned else numbers, np.float32, order="C"))
    quantized = quantize(weight, format, block_size, scale_storage=storage, name=name)
    size = float(weight.norm()) or 1.0
    return PackedWeight(quantized, matrix.is_turned, float((quantized.dequantize() - weight).norm()) / size)


def _layout(weight: PackedMatrix, profile: Profile, exact: bool, opset: int) -> Layout:
    chosen = choose_layout(weight, profile, exact=exact)
    return LAYOUTS["unpacked"] if chosen.name == "dequantize" and opset < _OPSET_OF_BLOCKS else chosen


def _write(
    model: ir.Model,
    weights: Mapping[str, tuple[Matrix, PackedWeight]],
    layout_of: Callable[[PackedMatrix], Layout],
    profile: Profile,
) -> dict[str, str]:
    """Put packed weights in the place of matrices; return which operator reads which."""
    writer = GraphWriter(model.graph)
    sources: dict[str, str] = {}
    for name, (matrix, weight) in weights.items():
        packed = PackedMatrix.of(name, weight.quantized)
        for node in matrix.readers:
            label = _label(name, sources)
            sources[label] = name
            writer.begin(label)
            if node.op_type == "Gather":
                output = write_embedding(writer, _operand(node, 1), packed, profile)
            else:
                output = layout_of(packed).write(writer, _operand(node, 0), packed)
                if len(node.inputs) > 2 and node.inputs[2] is not None:
                    output = writer.node("Add", [output, node.inputs[2]])
            writer.replace(node, output)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(model)
    return sources


def _label(name: str, taken: Collection[str]) -> str:
    """Return a name for an operator's nodes: the weight's, or that with a number if it has several readers."""
    label = name.replace("/", ".")
    numbered = (f"{label}#{number}" for number in itertools.count(2))
    return label if label not in taken else next(other for other in numbered if other not in taken)


def _operand(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    if value is None:
        raise ExportError(f"the ONNX node '{node.name}' lacks an operand", "export the model again")
    return value
