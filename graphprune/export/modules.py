"""What a matrix module becomes in ONNX: its weight, packed or dense, its adapter and its bias beside it."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from graphprune.errors import ExportError
from graphprune.export.embeddings import write_embedding
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.layouts import Profile, choose_layout
from graphprune.export.packed_matrix import PackedMatrix
from graphprune.export.stand_ins import DOMAIN, LINEAR
from quant import QuantEmbedding, QuantizedTensor, QuantLinear

RANK = "lora_rank"


Adapters = Literal["overridable", "constant", "merged"]


class ModuleWriter:
    """Replaces the stand-ins of a graph by what their modules compute.

    Args:
        model: The model whose modules the stand-ins name.
        graph: The graph with stand-ins.
        profile: What the file is to run on.
        exact: Whether to use only layouts that hold the quantized weights without rounding.
        adapters: What becomes of the packed layers' adapters.
    """

    def __init__(
        self, model: nn.Module, graph: ir.Graph, *, profile: Profile, exact: bool, adapters: Adapters
    ) -> None:
        self._model = model
        self._graph = graph
        self._profile = profile
        self._exact = exact
        self._adapters = adapters
        self._writer = GraphWriter(graph)
        self._names: dict[tuple[int, ...], str] = {}

    def write_all(self) -> None:
        """Replace every stand-in of the graph."""
        for node in [node for node in self._graph if node.domain == DOMAIN]:
            name = node.attributes["module"].as_string()
            self._writer.begin(name)
            module = self._model.get_submodule(name)
            x = node.inputs[0]
            if x is None:
                raise ExportError(f"the stand-in of {name} has no input", "report this as a bug")
            write = self._linear if node.op_type == LINEAR else self._embedding
            self._writer.replace(node, write(name, module, x))

    def _linear(self, name: str, module: nn.Module, x: ir.Value) -> ir.Value:
        if isinstance(module, QuantLinear) and self._adapters != "merged":
            weight = self._packed(name, module.quantized)
            y = choose_layout(weight, self._profile, exact=self._exact).write(self._writer, x, weight)
            y = self._adapter(name, module, x, y)
        else:
            y = self._writer.node(
                "MatMul", [x, self._writer.node("Transpose", [self._dense_weight(name, module)], perm=[1, 0])]
            )
        if "bias" not in dict(module.named_parameters(recurse=False)):
            return y
        return self._writer.node("Add", [y, self._dense(f"{name}.bias", module.get_parameter("bias"))])

    def _dense_weight(self, name: str, module: nn.Module) -> ir.Value:
        if isinstance(module, QuantLinear):
            return self._writer.initializer(f"{name}.weight", lambda: _float32(module.weight))
        return self._dense(f"{name}.weight", module.get_parameter("weight"))

    def _embedding(self, name: str, module: nn.Module, ids: ir.Value) -> ir.Value:
        if isinstance(module, QuantEmbedding):
            return write_embedding(self._writer, ids, self._packed(name, module.quantized), self._profile)
        return self._writer.node(
            "Gather", [self._dense(f"{name}.weight", module.get_parameter("weight")), ids], axis=0
        )

    def _adapter(self, name: str, module: QuantLinear, x: ir.Value, y: ir.Value) -> ir.Value:
        """Add `x A B`, a branch whose two matrices a session can be fed anew, of any rank, unless they are constant."""
        if module.lora_A is None:
            return y
        a = self._writer.initializer(f"{name}.lora_A.weight", lambda: adapter_factors(module)[0])
        b = self._writer.initializer(f"{name}.lora_B.weight", lambda: adapter_factors(module)[1])
        if self._adapters == "overridable":
            self._writer.make_overridable(a, [module.in_features, RANK])
            self._writer.make_overridable(b, [RANK, module.out_features])
        return self._writer.node(
            "Add", [y, self._writer.node("MatMul", [self._writer.node("MatMul", [x, a]), b])]
        )

    def _packed(self, name: str, quantized: QuantizedTensor) -> PackedMatrix:
        """Return the weight under the name of the first module that holds these very codes."""
        key = (quantized.codes.data_ptr(), quantized.scales.stored.data_ptr())
        return PackedMatrix.of(self._names.setdefault(key, f"{name}.weight"), quantized)

    def _dense(self, name: str, tensor: Tensor) -> ir.Value:
        """Return the initializer of a float tensor; a tensor that several modules share is stored once."""
        key = (tensor.data_ptr(), *tensor.shape, *tensor.stride())
        return self._writer.initializer(self._names.setdefault(key, name), lambda: _float32(tensor))


def adapter_factors(module: QuantLinear) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return a layer's adapters as ONNX multiplies by them: A (in, rank), and B (rank, out) with the scaling in it.

    Raises:
        ExportError: If it has none.
    """
    if module.lora_A is None or module.lora_B is None:
        raise ExportError("a layer without adapters has no factors", "report this as a bug")
    return _float32(module.lora_A).T, _float32(module.lora_B).T * np.float32(module.scaling)


def check_adapters(adapters: str) -> None:
    """Raise ExportError unless adapters can be written this way."""
    if adapters not in get_args(Adapters):
        raise ExportError(
            f"adapters cannot be written as {adapters!r}", f"use one of {', '.join(get_args(Adapters))}"
        )


def _float32(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).numpy()
