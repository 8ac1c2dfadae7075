"""The scales or offsets of a packed weight as they are stored; a session works them out when it loads the file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.packed_matrix import PackedMatrix
from quant.scales import DOUBLE_BLOCK, Scales, dynamic_levels


def flat_absmax(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Add what computes absmax, float32 (blocks,)."""
    return _flat(writer, f"{weight.name}.absmax", weight.scales)


def flat_offsets(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Add what computes the offsets of an affine weight, float32 (blocks,)."""
    if weight.offsets is None:
        raise ExportError(f"{weight.name} has no offsets", "report this as a bug")
    return _flat(writer, f"{weight.name}.offset", weight.offsets)


def _flat(writer: GraphWriter, name: str, scales: Scales) -> ir.Value:
    """Add what computes one float32 number a block from the numbers as they are stored."""
    parts = {
        part: writer.initializer(part, tensor.cpu().numpy) for part, tensor in scales.parts(name).items()
    }
    stored = parts[name]
    if scales.storage == "float32":
        return stored
    if scales.storage == "float16":
        return writer.node("Cast", [stored], to=ir.DataType.FLOAT.value)
    levels = writer.initializer("table.dynamic8", dynamic_levels().numpy)
    codes = writer.node("Cast", [stored], to=ir.DataType.INT32.value)
    each = writer.node("Unsqueeze", [parts[f"{name}_absmax"], writer.integers(1)])
    spread = writer.node("Expand", [each, writer.integers(1, DOUBLE_BLOCK)])
    flat = writer.node("Reshape", [spread, writer.integers(-1)])
    cut = [writer.integers(0), writer.integers(len(scales.stored)), writer.integers(0)]
    scaled = writer.node(
        "Mul", [writer.node("Gather", [levels, codes], axis=0), writer.node("Slice", [flat, *cut])]
    )
    return writer.node("Add", [scaled, parts[f"{name}_mean"]])


def row_scales(writer: GraphWriter, weight: PackedMatrix, block: int, divisor: float = 1.0) -> ir.Value:
    """Add what computes `absmax / divisor` for each block of a row: float32 (out_features, in_features / block)."""
    flat = flat_absmax(writer, weight)
    if divisor != 1:
        flat = writer.node("Div", [flat, _number(writer, divisor)])
    return _in_rows(writer, weight, flat, block)


def row_offsets(writer: GraphWriter, weight: PackedMatrix, block: int, share: float = 0.0) -> ir.Value:
    """Add what computes `offset + share * absmax` for each block of a row, the offset being 0 if there is none."""
    terms = []
    if share:
        terms.append(writer.node("Mul", [flat_absmax(writer, weight), _number(writer, share)]))
    if weight.offsets is not None:
        terms.append(flat_offsets(writer, weight))
    flat = terms[0] if len(terms) == 1 else writer.node("Add", terms)
    return _in_rows(writer, weight, flat, block)


def _in_rows(writer: GraphWriter, weight: PackedMatrix, flat: ir.Value, block: int) -> ir.Value:
    """Arrange one number a quantization block as one a kernel block: repeated where the kernel's are smaller."""
    repeats = weight.block_size // block
    if repeats > 1:
        column = writer.node("Unsqueeze", [flat, writer.integers(1)])
        spread = writer.node("Expand", [column, writer.integers(1, repeats)])
        # The last quantization block may be shorter than the others.
        all_of_them = writer.node("Reshape", [spread, writer.integers(-1)])
        count = weight.codes.size // block
        cut = [writer.integers(0), writer.integers(count), writer.integers(0)]
        flat = writer.node("Slice", [all_of_them, *cut])
    return writer.node("Reshape", [flat, writer.integers(weight.out_features, weight.in_features // block)])


def _number(writer: GraphWriter, value: float) -> ir.Value:
    return writer.initializer(f"number.{value:.9g}", lambda: np.array(value, dtype=np.float32))
