"""The weights that an exported file really holds, read by the operators' published definitions alone.

Nothing here is shared with the code that writes files: constant inputs are computed by onnx's reference
implementation, and quantized operators are unpacked in numpy as their schema says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from graphprune.errors import VerificationError

Array = npt.NDArray[Any]
Read = Callable[[ir.Node], Array]

# bitsandbytes' table, which is the one in ONNX Runtime's MatMulBnb4.
_NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)  # fmt: skip


def file_weights(path: Path) -> Iterator[tuple[str, Array]]:
    """Yield the module's name and its dense weight (out, in) for each quantized operator of a file.

    A module whose weight is unpacked to float32 by standard operators is not yielded. The name is what stands before
    the slash in the operator's own name; where its codes are joined of several, in the names of what these come from.
    """
    model = ir.load(path)
    for node in model.graph:
        read = _READERS.get(node.op_type)
        if read is not None and node.name is not None:
            weight = read(node)
            for name, rows, _ in _parts(node):
                yield name, weight[rows]


def _parts(node: ir.Node) -> Iterator[tuple[str, slice, ir.Value]]:
    """Yield the name of each weight that an operator holds, its rows, and the value that is computed with them."""
    join = node.inputs[1].producer() if node.op_type == "MatMulNBits" and node.inputs[1] is not None else None
    if join is None or join.op_type != "Concat":
        yield _name(node), slice(None), node.outputs[0]
        return
    (split,) = node.outputs[0].consumers()
    sizes = constant(split.inputs[1])
    for codes, size, end, output in zip(join.inputs, sizes, sizes.cumsum(), split.outputs, strict=True):
        yield _name(None if codes is None else codes.producer()), slice(end - size, end), output


def _name(node: ir.Node | None) -> str:
    if node is None or node.name is None:
        raise VerificationError("the file does not say whose a quantized weight is", "export the model again")
    return node.name.split("/")[0]


def _matmul_n_bits(node: ir.Node) -> Array:
    count, columns, bits, block = (_integer(node, name) for name in ("N", "K", "bits", "block_size"))
    codes = _unpack_low_first(constant(node.inputs[1]).reshape(count, -1), bits)
    scales = constant(node.inputs[2]).reshape(count, -1)
    weight = _scale(codes, scales, bits, block)[:, :columns]
    for _, rows, product in _parts(node):
        weight[rows] += _of_block_sums(product, columns)
    return weight


def _gather_block_quantized(node: ir.Node) -> Array:
    bits, block = _integer(node, "bits"), _integer(node, "block_size")
    codes = _unpack_low_first(constant(node.inputs[0]), bits)
    return _scale(codes, constant(node.inputs[2]), bits, block) + _of_rows(node.outputs[0], codes.shape[1])


def _matmul_bnb4(node: ir.Node) -> Array:
    rows, columns, block = (_integer(node, name) for name in ("N", "K", "block_size"))
    packed = constant(node.inputs[1]).reshape(-1, 1)
    levels = _NF4[np.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1)[: rows * columns]]
    absmax = np.repeat(constant(node.inputs[2]), block)[: rows * columns]
    return (levels * absmax).reshape(rows, columns)


def _dequantize_linear(node: ir.Node) -> Array:
    weight = constant(node.outputs[0]).T
    (product,) = node.outputs[0].consumers()
    return weight + _of_block_sums(product.outputs[0], weight.shape[1])


def _of_block_sums(product: ir.Value, columns: int) -> Array:
    """Return what ``product + block sums of x @ offsets`` adds to each weight: (out, in), or 0 without such a sum."""
    for node in product.consumers():
        for term in node.inputs if node.op_type == "Add" else ():
            factor = None if term is None else term.producer()
            sums = None if factor is None else factor.inputs[0]
            summing = None if sums is None else sums.producer()
            if factor is not None and summing is not None and summing.op_type == "ReduceSum":
                offsets = constant(factor.inputs[1]).T
                return np.repeat(offsets, columns // offsets.shape[1], axis=1)
    return np.zeros(1, dtype=np.float32)


def _of_rows(rows: ir.Value, columns: int) -> Array:
    """Return what is added to the looked-up rows in blocks: (rows, in), or 0 if nothing is."""
    for reshape in rows.consumers():
        for add in reshape.outputs[0].consumers() if reshape.op_type == "Reshape" else ():
            unsqueeze = (
                add.inputs[1].producer() if add.op_type == "Add" and add.inputs[1] is not None else None
            )
            gather = unsqueeze.inputs[0] if unsqueeze is not None else None
            source = gather.producer() if gather is not None else None
            if source is not None and source.op_type == "Gather":
                offsets = constant(source.inputs[0])
                return np.repeat(offsets, columns // offsets.shape[1], axis=1)
    return np.zeros(1, dtype=np.float32)


_READERS: dict[str, Read] = {
    "MatMulNBits": _matmul_n_bits,
    "GatherBlockQuantized": _gather_block_quantized,
    "MatMulBnb4": _matmul_bnb4,
    "DequantizeLinear": _dequantize_linear,
}


def constant(value: ir.Value | None) -> Array:
    """Compute a value that depends on initializers alone."""
    if value is not None and value.const_value is not None:
        return value.const_value.numpy()
    producer = None if value is None else value.producer()
    if value is None or producer is None:
        raise VerificationError(
            f"a quantized weight depends on {value and value.name}, which is not stored",
            "export the model again",
        )
    feeds = {input.name: constant(input) for input in producer.inputs if input is not None}
    proto = ir.to_proto(producer)
    inputs = [
        onnx.helper.make_tensor_value_info(str(name), onnx.TensorProto.UNDEFINED, None) for name in feeds
    ]
    outputs = [onnx.helper.make_tensor_value_info(str(value.name), onnx.TensorProto.UNDEFINED, None)]
    graph = onnx.helper.make_graph([proto], "constant", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", 23)]
    return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run(None, feeds)[0]


def _unpack_low_first(packed: Array, bits: int) -> Array:
    """Unpack (rows, bytes) to (rows, codes): a byte's first code lies in its lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[:, :, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), -1)


def _scale(codes: Array, scales: Array, bits: int, block: int) -> Array:
    centred = codes.astype(np.float32) - np.float32(2 ** (bits - 1))
    return centred * np.repeat(scales, block, axis=1)[:, : codes.shape[1]]


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()
