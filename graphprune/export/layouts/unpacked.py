"""Any packed weight by standard operators, exactly: float32 in memory, unpacked when a session loads the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphprune.export.graph_writer import GraphWriter
from graphprune.export.layouts.codes import expanded
from graphprune.export.layouts.registry import always, layout
from graphprune.export.layouts.scales import flat_absmax, flat_offsets
from graphprune.export.packed_matrix import PackedMatrix


@layout("unpacked", fits=always)
def write_unpacked(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """MatMul on float32 weights that a session makes of the packed ones when it loads the file."""
    return writer.node("MatMul", [x, writer.node("Transpose", [unpacked(writer, weight)], perm=[1, 0])])


def unpacked(writer: GraphWriter, weight: PackedMatrix) -> ir.Value:
    """Add the nodes that compute the float32 matrix (out_features, in_features)."""
    size, block = weight.codes.size, weight.block_size
    blocks = -(-size // block)
    missing = blocks * block - size
    # The last block may be incomplete: fill it up with code 0, and cut off after scaling.
    whole = replace(
        weight,
        name=f"{weight.name}.padded" if missing else weight.name,
        codes=np.pad(weight.codes.reshape(1, -1), ((0, 0), (0, missing))),
    )
    values = expanded(writer, whole, weight.levels, "table.float")
    scaled = writer.node("Reshape", [values, writer.integers(blocks, block)])
    columns = [("Mul", flat_absmax(writer, weight))]
    if weight.offsets is not None:
        columns.append(("Add", flat_offsets(writer, weight)))
    for operator, column in columns:
        scaled = writer.node(operator, [scaled, writer.node("Unsqueeze", [column, writer.integers(1)])])
    flat = writer.node("Reshape", [scaled, writer.integers(-1)])
    cut = writer.node("Slice", [flat, writer.integers(0), writer.integers(size), writer.integers(0)])
    return writer.node("Reshape", [cut, writer.integers(weight.out_features, weight.in_features)])
