"""What a matrix module becomes in ONNX: its weight, packed or dense, its adapter and its bias beside it."""

from __future__ import annotations

from dataclasses import dataclass
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
from graphprune.export.packed_matrix import PackedMatrix, stack
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
        for nodes in _by_input([node for node in self._graph if node.domain == DOMAIN]):
            x = nodes[0].inputs[0]
            if x is None:
                raise ExportError(f"a stand-in of {_module(nodes[0])} has no input", "report this as a bug")
            packed: list[_Packed] = []
            for node in nodes:
                name, module = _module(node), self._model.get_submodule(_module(node))
                if isinstance(module, QuantLinear) and self._adapters != "merged":
                    packed.append(_Packed(name, node, module, self._packed(name, module.quantized)))
                else:
                    write = self._linear if node.op_type == LINEAR else self._embedding
                    self._writer.begin(name)
                    self._writer.replace([node], {name: write(name, module, x)})
            for stacked in _stacks(packed):
                self._writer.begin(" + ".join(layer.name for layer in stacked))
                self._writer.replace([layer.node for layer in stacked], self._products(stacked, x))

    def _linear(self, name: str, module: nn.Module, x: ir.Value) -> ir.Value:
        if isinstance(module, QuantLinear):
            dense = self._writer.initializer(f"{name}.weight", lambda: _float32(module.weight))
        else:
            dense = self._dense(f"{name}.weight", module.get_parameter("weight"))
        product = self._writer.node("MatMul", [x, self._writer.node("Transpose", [dense], perm=[1, 0])])
        return self._biased(name, module, product)

    def _products(self, layers: list[_Packed], x: ir.Value) -> dict[str, ir.Value]:
        """Multiply by the weights of all layers at once, cut the result, and add what each has beside its weight."""
        weight = stack([layer.weight for layer in layers])
        y = choose_layout(weight, self._profile, exact=self._exact).write(self._writer, x, weight)
        if self._adapters == "constant":
            y = self._constant_adapters(layers, x, y)
        sizes = [layer.module.out_features for layer in layers]
        outputs = {}
        for layer, part in zip(layers, [y] if len(sizes) == 1 else self._writer.split(y, sizes), strict=True):
            if self._adapters == "overridable":
                part = self._adapter(layer.name, layer.module, x, part)
            outputs[layer.name] = self._biased(layer.name, layer.module, part)
        return outputs

    def _biased(self, name: str, module: nn.Module, y: ir.Value) -> ir.Value:
        if "bias" not in dict(module.named_parameters(recurse=False)):
            return y
        return self._writer.node("Add", [y, self._dense(f"{name}.bias", module.get_parameter("bias"))])

    def _embedding(self, name: str, module: nn.Module, ids: ir.Value) -> ir.Value:
        if isinstance(module, QuantEmbedding):
            return write_embedding(self._writer, ids, self._packed(name, module.quantized), self._profile)
        return self._writer.node(
            "Gather", [self._dense(f"{name}.weight", module.get_parameter("weight")), ids], axis=0
        )

    def _factors(self, name: str, module: QuantLinear) -> tuple[ir.Value, ir.Value] | None:
        """Return the initializers of `adapter_factors`; None without adapters."""
        if module.lora_A is None:
            return None
        return (
            self._writer.initializer(f"{name}.lora_A.weight", lambda: adapter_factors(module)[0]),
            self._writer.initializer(f"{name}.lora_B.weight", lambda: adapter_factors(module)[1]),
        )

    def _adapter(self, name: str, module: QuantLinear, x: ir.Value, y: ir.Value) -> ir.Value:
        """Add `x A B`, a branch whose two matrices a session can be fed anew, of any rank."""
        factors = self._factors(name, module)
        if factors is None:
            return y
        self._writer.make_overridable(factors[0], [module.in_features, RANK])
        self._writer.make_overridable(factors[1], [RANK, module.out_features])
        return self._low_rank(x, y, *factors)

    def _constant_adapters(self, layers: list[_Packed], x: ir.Value, y: ir.Value) -> ir.Value:
        """Add the adapters of stacked layers as one: A side by side, B on a diagonal, put together at loading."""
        downs, ups, before = [], [], 0
        total = sum(layer.module.out_features for layer in layers)
        for layer in layers:
            factors, width = self._factors(layer.name, layer.module), layer.module.out_features
            if factors is not None:
                downs.append(factors[0])
                margins = self._writer.integers(0, before, 0, total - before - width)
                ups.append(factors[1] if width == total else self._writer.node("Pad", [factors[1], margins]))
            before += width
        if not downs:
            return y
        if len(downs) == 1:
            return self._low_rank(x, y, downs[0], ups[0])
        down, up = (
            self._writer.node("Concat", [*parts], axis=axis) for parts, axis in ((downs, 1), (ups, 0))
        )
        return self._low_rank(x, y, down, up)

    def _low_rank(self, x: ir.Value, y: ir.Value, down: ir.Value, up: ir.Value) -> ir.Value:
        return self._writer.node(
            "Add", [y, self._writer.node("MatMul", [self._writer.node("MatMul", [x, down]), up])]
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


@dataclass(frozen=True, slots=True)
class _Packed:
    name: str
    node: ir.Node
    module: QuantLinear
    weight: PackedMatrix


def _module(node: ir.Node) -> str:
    return node.attributes["module"].as_string()


def _by_input(nodes: list[ir.Node]) -> list[list[ir.Node]]:
    """Gather the nodes that read the same value, in the graph's order."""
    readers: dict[ir.Value | None, list[ir.Node]] = {}
    for node in nodes:
        readers.setdefault(node.inputs[0], []).append(node)
    return list(readers.values())


def _stacks(layers: list[_Packed]) -> list[list[_Packed]]:
    """Gather the layers whose weights stack; a weight that two modules share is multiplied by twice."""
    found: list[list[_Packed]] = []
    for layer in layers:
        names = {layer.weight.name}
        fitting = (
            stacked
            for stacked in found
            if layer.weight.stacks_with(stacked[0].weight)
            and not names & {each.weight.name for each in stacked}
        )
        stacked = next(fitting, None)
        if stacked is None:
            found.append([layer])
        else:
            stacked.append(layer)
    return found


def _float32(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).numpy()
