"""What a matrix becomes in ONNX: its weight, packed or dense, its adapter and its bias beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod

import onnx_ir as ir
import torch
from torch import Tensor, nn

from graphprune.errors import ExportError, ExportWarning
from graphprune.export.adapters import Adapters, AdapterWriter, as_float32
from graphprune.export.embeddings import write_embedding
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.grouped_products import GROUPED
from graphprune.export.halves import as_stored
from graphprune.export.layouts import Profile, choose_layout
from graphprune.export.layouts.unpacked import unpacked
from graphprune.export.packed_matrix import PackedMatrix
from graphprune.export.packed_weights import Packed, label_of, matrix, weight_name
from graphprune.export.stand_ins import DOMAIN, EMBEDDING, LINEAR, WEIGHT
from graphprune.export.weight_operands import WeightOperand, second_operand
from quant import PackedParameter, QuantEmbedding, QuantLinear


class ModuleWriter:
    """Replaces the stand-ins of a graph by what their modules compute.

    Args:
        model: The model whose modules the stand-ins name.
        graph: The graph with stand-ins.
        profile: What the file is to run on.
        exact: Whether to use only layouts that hold the quantized weights without rounding.
        adapters: What becomes of the packed weights' adapters.
    """

    def __init__(
        self, model: nn.Module, graph: ir.Graph, *, profile: Profile, exact: bool, adapters: Adapters
    ) -> None:
        self._model = model
        self._graph = graph
        self._profile = profile
        self._exact = exact
        self._merged = adapters == "merged"
        self._writer = GraphWriter(graph)
        self._adapters = AdapterWriter(self._writer, adapters)
        self._names: dict[tuple[int, ...], str] = {}

    def write_all(self) -> None:
        """Replace every stand-in of the graph."""
        for node in list(self._graph):
            operand = second_operand(node)
            if node.op_type != GROUPED and operand is not None and self._is_product(operand):
                self._replace_product(node, operand)
        self._replace_each((LINEAR, EMBEDDING), self._replace_module)
        self._replace_each((GROUPED,), self._replace_grouped)
        self._writer.drop_unread()
        self._replace_each((WEIGHT,), self._replace_weight)

    def _replace_each(self, kinds: tuple[str, ...], replace: Callable[[ir.Node], None]) -> None:
        for node in list(self._graph):
            if node.domain == DOMAIN and node.op_type in kinds:
                replace(node)

    def _replace_module(self, node: ir.Node) -> None:
        name = _module_name(node)
        self._writer.begin(name)
        module = self._model.get_submodule(name)
        write = self._linear if node.op_type == LINEAR else self._embedding
        self._writer.replace(node, write(name, module, _input(node, 0)))

    def _linear(self, name: str, module: nn.Module, x: ir.Value) -> ir.Value:
        if isinstance(module, QuantLinear) and not self._merged:
            y = self._product(name, module, None, x)
        else:
            weight = self._dense_weight(name, module)
            y = self._writer.node("MatMul", [x, self._writer.node("Transpose", [weight], perm=[1, 0])])
        if "bias" not in dict(module.named_parameters(recurse=False)):
            return y
        return self._writer.node("Add", [y, self._dense(f"{name}.bias", module.get_parameter("bias"))])

    def _embedding(self, name: str, module: nn.Module, ids: ir.Value) -> ir.Value:
        if isinstance(module, QuantEmbedding):
            return write_embedding(self._writer, ids, self._packed(name, module, None), self._profile)
        weight = module.get_parameter("weight")
        rows = self._writer.node("Gather", [self._stored(f"{name}.weight", weight), ids], axis=0)
        return rows if weight.dtype == torch.float32 else self._widened(rows)

    def _is_product(self, operand: WeightOperand) -> bool:
        """Whether a product sums over the inputs of a packed matrix, and is not to be of a dense one."""
        module = self._model.get_submodule(operand.module)
        if not isinstance(module, Packed) or (self._merged and not isinstance(module, QuantEmbedding)):
            return False
        transposed = isinstance(module, PackedParameter) and module.transposed
        alone = (len(module.shape) == 2) == (operand.index is None)
        return alone and operand.flipped != transposed

    def _replace_product(self, node: ir.Node, operand: WeightOperand) -> None:
        module = self._model.get_submodule(operand.module)
        if not isinstance(module, Packed):
            raise ExportError(f"{operand.module} is not packed", "report this as a bug")
        self._writer.begin(_node_label(operand.module, operand.index))
        y = self._product(operand.module, module, operand.index, _input(node, 0))
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        self._writer.replace(node, y if bias is None else self._writer.node("Add", [y, bias]))

    def _replace_grouped(self, node: ir.Node) -> None:
        """Cut the rows at their groups' ends, multiply each piece by its matrix, and join them again."""
        x, matrices, ends = (_input(node, index) for index in range(3))
        count = matrices.shape[0] if matrices.shape is not None else None
        if not isinstance(count, int):
            raise ExportError("a grouped product has an unknown number of groups", "report this as a bug")
        self._writer.begin(str(node.name))
        pieces = self._writer.split(x, self._sizes(ends), count)
        operand = second_operand(node)
        module = None if operand is None else self._model.get_submodule(operand.module)
        packed = operand is not None and self._is_product(WeightOperand(operand.module, operand.flipped, 0))
        products = []
        for index, piece in enumerate(pieces):
            if operand is not None and isinstance(module, Packed) and packed:
                self._writer.label(_node_label(operand.module, index))
                products.append(self._product(operand.module, module, index, piece))
            else:
                each = self._writer.node("Gather", [matrices, self._writer.index(index)], axis=0)
                products.append(self._writer.node("MatMul", [piece, each]))
        self._writer.label(str(node.name))
        self._writer.replace(node, self._writer.node("Concat", products, axis=0))

    def _sizes(self, ends: ir.Value) -> ir.Value:
        """Return the groups' sizes from the number of rows up to the end of each, int64 (groups,)."""
        numbers = self._writer.integers
        last = self._writer.node("Cast", [ends], to=ir.DataType.INT64.value)
        before = self._writer.node("Slice", [last, numbers(0), numbers(-1), numbers(0)])
        first = self._writer.node("Concat", [numbers(0), before], axis=0)
        return self._writer.node("Sub", [last, first])

    def _replace_weight(self, node: ir.Node) -> None:
        """Write a weight that something else than a product reads."""
        name = _module_name(node)
        module = self._model.get_submodule(name)
        self._writer.begin(label_of(name))
        if isinstance(module, Packed) and (isinstance(module, QuantEmbedding) or not self._merged):
            warnings.warn(
                f"{weight_name(name)} stays packed in the file, and a session unpacks it to float32 when it opens: "
                "it is read by another operator than a product over its inputs",
                ExportWarning,
                stacklevel=6,
            )
            self._writer.replace(node, self._unpacked(name, module))
        else:
            weight = self._dense_weight(name, module)
            if weight.is_initializer():
                node.outputs[0].replace_all_uses_with(weight)
            else:
                self._writer.replace(node, weight)

    def _product(self, name: str, module: Packed, index: int | None, x: ir.Value) -> ir.Value:
        weight = self._packed(name, module, index)
        y = choose_layout(weight, self._profile, exact=self._exact).write(self._writer, x, weight)
        return self._adapters.add(label_of(name), module, index, x, y)

    def _unpacked(self, name: str, module: Packed) -> ir.Value:
        """Return a whole packed weight, or stack of such, as float32 that is worked out when a session opens."""
        *stack, rows, columns = module.shape
        weight = weight_name(name)
        if any(held.startswith(f"{weight}.codes") for held in self._graph.initializers):
            weight = f"{weight}.unpacked"  # a product holds the same codes in an order of its own
        flat = PackedMatrix.of(weight, matrix(module, (prod(stack) * rows, columns)))
        shape = self._writer.integers(*stack, rows, columns)
        whole = self._writer.node("Reshape", [unpacked(self._writer, flat), shape])
        order = [*range(len(stack)), len(stack) + 1, len(stack)]
        columns_first = self._writer.node("Transpose", [whole], perm=order)
        read = self._adapters.added(label_of(name), module, columns_first)
        transposed = isinstance(module, PackedParameter) and module.transposed
        return read if transposed else self._writer.node("Transpose", [read], perm=order)

    def _dense_weight(self, name: str, module: nn.Module) -> ir.Value:
        if isinstance(module, QuantLinear):
            return self._writer.initializer(f"{name}.weight", lambda: as_float32(module.weight))
        if isinstance(module, PackedParameter):
            # A parametrization is given what stands in its parameter's place, and this one does not read it.
            return self._writer.initializer(weight_name(name), lambda: as_float32(module(module.codes)))
        return self._dense(f"{name}.weight", module.get_parameter("weight"))

    def _packed(self, name: str, module: Packed, index: int | None) -> PackedMatrix:
        """Return the weight under the name of the first module that holds these very codes."""
        place = -1 if index is None else index
        key = (module.codes.data_ptr(), module.quantized.scales.stored.data_ptr(), place)
        suffix = "" if index is None else f".{index}"
        held = self._names.setdefault(key, f"{weight_name(name)}{suffix}")
        return PackedMatrix.of(held, matrix(module, index=index))

    def _dense(self, name: str, tensor: Tensor) -> ir.Value:
        """Return a tensor in float32."""
        stored = self._stored(name, tensor)
        return stored if tensor.dtype == torch.float32 else self._widened(stored)

    def _stored(self, name: str, tensor: Tensor) -> ir.Value:
        """Return the initializer of a tensor as it is; a tensor that several modules share is stored once."""
        key = (tensor.data_ptr(), *tensor.shape, *tensor.stride())
        return self._writer.initializer(self._names.setdefault(key, name), lambda: as_stored(tensor))

    def _widened(self, half: ir.Value) -> ir.Value:
        return self._writer.node("Cast", [half], to=ir.DataType.FLOAT.value)


def _module_name(node: ir.Node) -> str:
    return node.attributes["module"].as_string()


def _node_label(module: str, index: int | None) -> str:
    return label_of(module) if index is None else f"{label_of(module)}.{index}"


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ExportError(f"the stand-in {node.name} lacks an input", "report this as a bug")
    return value
