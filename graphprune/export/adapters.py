"""What a packed weight's adapters become in ONNX."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from graphprune.errors import ExportError
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.packed_weights import Packed
from quant import QuantEmbedding

RANK = "lora_rank"

Adapters = Literal["overridable", "constant", "merged"]


class AdapterWriter:
    """Writes adapters as two initializers each, `<label>.lora_A.weight` and `<label>.lora_B.weight`.

    Args:
        writer: Where initializers and nodes go.
        adapters: What becomes of them; "merged" ones are not written here.
    """

    def __init__(self, writer: GraphWriter, adapters: Adapters) -> None:
        self._writer = writer
        self._overridable = adapters == "overridable"

    def add(self, label: str, module: Packed, index: int | None, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return `y + x A B`, a branch whose matrices a session can be fed anew, of any rank, unless constant.

        Args:
            label: Of the weight, a whole stack if it is one.
            module: What holds the adapters, if there are any.
            index: Which matrix of a stack is meant.
            x: (..., in_features).
            y: (..., out_features).
        """
        if not has_adapters(module):
            return y
        a, b = self._factors(label, module)
        if index is not None:
            a, b = (self._writer.node("Gather", [part, self._writer.index(index)], axis=0) for part in (a, b))
        down = self._writer.node("MatMul", [x, a])
        return self._writer.node("Add", [y, self._writer.node("MatMul", [down, b])])

    def added(self, label: str, module: Packed, weight: ir.Value) -> ir.Value:
        """Return `weight + A B`, all of them (..., in_features, out_features)."""
        if not has_adapters(module):
            return weight
        return self._writer.node(
            "Add", [weight, self._writer.node("MatMul", [*self._factors(label, module)])]
        )

    def _factors(self, label: str, module: Packed) -> tuple[ir.Value, ir.Value]:
        a = self._writer.initializer(f"{label}.lora_A.weight", lambda: adapter_factors(module)[0])
        b = self._writer.initializer(f"{label}.lora_B.weight", lambda: adapter_factors(module)[1])
        if self._overridable:
            *stack, rows, columns = module.shape
            self._writer.make_overridable(a, [*stack, columns, RANK])
            self._writer.make_overridable(b, [*stack, RANK, rows])
        return a, b


def has_adapters(module: Packed) -> bool:
    """Return whether a packed weight has adapters beside it."""
    return not isinstance(module, QuantEmbedding) and module.lora_A is not None


def adapter_factors(module: Packed) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return adapters as ONNX multiplies by them: A (..., in, rank), and B (..., rank, out) with the scaling in it.

    Raises:
        ExportError: If there are none.
    """
    if isinstance(module, QuantEmbedding) or module.lora_A is None or module.lora_B is None:
        raise ExportError("a weight without adapters has no factors", "report this as a bug")
    return as_float32(module.lora_A.mT), as_float32(module.lora_B.mT) * np.float32(module.scaling)


def check_adapters(adapters: str) -> None:
    """Raise ExportError unless adapters can be written this way."""
    if adapters not in get_args(Adapters):
        raise ExportError(
            f"adapters cannot be written as {adapters!r}", f"use one of {', '.join(get_args(Adapters))}"
        )


def as_float32(tensor: Tensor) -> npt.NDArray[np.float32]:
    """Return a tensor as an array."""
    return tensor.detach().to("cpu").float().numpy()
