"""One packed matrix in every ONNX form: bytes, CPU time of a product, and its error.

    python examples/benchmarks/onnx_layouts.py                      # 1536 x 576, as in the demo model
    python examples/benchmarks/onnx_layouts.py --rows 4096 --columns 4096

Each row is a session of one product on one thread. Times are the CPU time of the thread, the smallest of many
repetitions; errors are of the product with random activations, against the dequantized weight in float64.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

import quant
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.layouts import LAYOUTS
from graphprune.export.packed_matrix import PackedMatrix
from quant.scales import Storage

FORMS: tuple[tuple[str, str, Storage], ...] = (
    ("int4", "grid", "float32"),
    ("uint4", "grid", "float32"),
    ("uint4", "grid", "double"),
    ("uint3", "grid", "float32"),
    ("uint2", "grid", "float32"),
    ("int8", "grid", "float32"),
    ("nf4", "byte_table", "float32"),
    ("nf3", "byte_table", "float32"),
    ("nf2", "byte_table", "float32"),
    ("nf4", "bnb4", "float32"),
    ("nf2", "bnb4", "float32"),
    ("int4", "dequantize", "float32"),
    ("nf4", "dequantize", "float32"),
    ("nf4", "unpacked", "float32"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one form takes.

    Attributes:
        nbytes: Of the model file.
        load: CPU seconds to open a session.
        times: CPU seconds of a product, by tokens.
        error: Largest error of the product, over its largest number.
    """

    nbytes: int
    load: float
    times: dict[int, float]
    error: float


def model_of(weight: PackedMatrix, layout: str) -> bytes:
    """Return a model of one product with the weight in a form."""
    x = ir.Value(
        name="x",
        shape=ir.Shape(["batch", "sequence", weight.in_features]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    product = ir.node("Product", [x], domain="placeholder")
    product.outputs[0].name = "y"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    product.outputs[0].shape = ir.Shape([None, None, None])
    opsets = {"": 23, "com.microsoft": 1}
    graph = ir.Graph([x], [product.outputs[0]], nodes=[product], opset_imports=opsets, name="product")
    writer = GraphWriter(graph)
    writer.begin("product")
    writer.replace(product, LAYOUTS[layout].write(writer, x, weight))
    return ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()


def measure(quantized: quant.QuantizedTensor, layout: str, tokens: list[int], repetitions: int) -> Measured:
    """Open the form's session on one thread and multiply."""
    content = model_of(PackedMatrix.of("weight", quantized), layout)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    start = time.process_time()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    load = time.process_time() - start
    generator = np.random.default_rng(0)
    times, error = {}, 0.0
    for count in tokens:
        x = generator.standard_normal((1, count, quantized.shape[1]), dtype=np.float32)
        seconds = []
        for _ in range(max(5, repetitions // count)):
            start = time.thread_time()
            session.run(None, {"x": x})
            seconds.append(time.thread_time() - start)
        times[count] = min(seconds)
        expected = x.astype(np.float64) @ quantized.dequantize().double().numpy().T
        error = float(np.abs(session.run(None, {"x": x})[0] - expected).max() / np.abs(expected).max())
    return Measured(len(content), load, times, error)


def main() -> None:
    """Measure all forms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=576)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repetitions", type=int, default=300)
    given = parser.parse_args()
    weight = torch.randn(given.rows, given.columns, generator=torch.Generator().manual_seed(0))
    heads = ["format", "layout", "scales", "bits a weight", "file / quant", "load ms"]
    heads += [f"ms at {count}" for count in given.tokens] + ["error"]
    table = Table(
        *heads, title=f"{given.rows} x {given.columns}, blocks of 64, onnxruntime {onnxruntime.__version__}"
    )
    for format, layout, storage in FORMS:
        quantized = quant.quantize(weight, format, 64, scale_storage=storage)
        found = measure(quantized, layout, given.tokens, given.repetitions)
        table.add_row(
            format,
            layout,
            storage,
            f"{8 * found.nbytes / weight.numel():.3f}",
            f"{found.nbytes / quantized.nbytes:.3f}",
            f"{1e3 * found.load:.0f}",
            *(f"{1e3 * seconds:.3f}" for seconds in found.times.values()),
            f"{found.error:.1e}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
