"""Codebooks within NF4, of 4 bits or 2, in bitsandbytes' own form: exact, slow on a CPU, native on CUDA."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import MICROSOFT, GraphWriter
from graphprune.export.layouts.codes import codebook_codes, nibbles
from graphprune.export.layouts.registry import layout
from graphprune.export.layouts.scales import flat_absmax
from graphprune.export.packed_matrix import PackedMatrix, pack
from quant import get_format


@layout("bnb4", fits=lambda weight: weight.offsets is None and _nf4_codes(weight) is not None)
def write_bnb4(writer: GraphWriter, x: ir.Value, weight: PackedMatrix) -> ir.Value:
    """MatMulBnb4 with NF4's own table; flat blocks may cross rows.

    Codes of 2 bits become NF4's when a session loads the file: a byte of four is an index into a table of two bytes.
    """
    nf4_codes = _nf4_codes(weight)
    if nf4_codes is None:
        raise ExportError(f"{weight.name}: its levels are not NF4's", "use another layout")
    codes = _codes(writer, weight, nf4_codes)
    return writer.node(
        "MatMulBnb4",
        [x, codes, flat_absmax(writer, weight)],
        domain=MICROSOFT,
        K=weight.in_features,
        N=weight.out_features,
        block_size=weight.block_size,
        quant_type=1,
    )


def _codes(writer: GraphWriter, weight: PackedMatrix, nf4_codes: npt.NDArray[np.uint8]) -> ir.Value:
    if np.array_equal(nf4_codes, np.arange(16)):
        return codebook_codes(writer, weight)
    if weight.bits == 2 and len(nf4_codes) == 4:
        values = tuple(int(code) for code in nf4_codes)
        return nibbles(writer, codebook_codes(writer, weight), values, low_first=False)
    return writer.initializer(
        f"{weight.name}.nf4_codes", lambda: pack(nf4_codes[weight.codes].reshape(-1), 4)
    )


def _nf4_codes(weight: PackedMatrix) -> npt.NDArray[np.uint8] | None:
    """Return NF4's code for each level, or None if a level is not one of NF4's."""
    nf4 = get_format("nf4").levels.numpy()
    nearest = np.abs(weight.levels[:, None] - nf4).argmin(axis=1)
    # NF2's levels by definition differ from NF4's published table in the last bit.
    same = np.abs(weight.levels - nf4[nearest]) <= np.spacing(np.float32(1))
    return nearest.astype(np.uint8) if same.all() else None
