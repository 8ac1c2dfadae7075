"""Small ONNX models, built node by node, as onnxruntime's own builders write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


class GraphBuilder:
    """Collects nodes and initializers; every method returns the names that the next node reads."""

    def __init__(self, opset: int = 21) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.opset = opset
        self._random = np.random.default_rng(0)

    def weight(self, name: str, *shape: int, dtype: str = "float32") -> str:
        if dtype == "float32":
            numbers = self._random.standard_normal(shape).astype(dtype) * 0.3
        else:
            numbers = self._random.integers(0, 15, shape).astype(dtype)
        return self.constant(name, numbers)

    def constant(self, name: str, numbers: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(numbers), name))
        return name

    def node(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        name = f"{op_type}_{len(self.nodes)}"
        results = [f"{name}_out{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, results, name=name, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    def fused(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        return self.node(op_type, *inputs, outputs=outputs, domain=MICROSOFT, **attributes)

    def model(
        self,
        inputs: dict[str, tuple[str, Sequence[int | str | None]]],
        outputs: Sequence[str],
        functions: Sequence[onnx.FunctionProto] = (),
    ) -> ir.Model:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [
                helper.make_tensor_value_info(name, TensorProto.DataType.Value(dtype), shape)
                for name, (dtype, shape) in inputs.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.initializers,
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        imports += [helper.make_opsetid(function.domain, 1) for function in functions]
        return ir.from_proto(
            helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
        )


HIDDEN, HEADS, KV_HEADS, WIDTH, FFN, VOCABULARY, LAYERS = 64, 4, 2, 16, 96, 61, 2
POSITIONS = 32


def genai_decoder(bits: int | None = None, packed: bool = False) -> ir.Model:
    """A Llama as onnxruntime-genai's builder writes it: grouped-query attention, skip norms, caches.

    Args:
        bits: Of block-quantized weights (blocks of 16); None for plain MatMul.
        packed: Whether query, key and value come from one projection.
    """
    build = _Decoder(bits)
    hidden = build.embedding()
    normed = build.node(
        "SimplifiedLayerNormalization", hidden, build.weight("layers.0.input_norm", HIDDEN), axis=-1
    )
    cache: list[str] = []
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        attended, presents = build.attention(name, normed, packed)
        cache += presents
        normed, hidden = build.skip_norm(f"{name}.post_norm", hidden, attended)
        gate = build.linear(f"{name}.gate", normed, FFN, HIDDEN)
        up = build.linear(f"{name}.up", normed, FFN, HIDDEN)
        wide = build.node("Mul", build.node("Mul", gate, build.node("Sigmoid", gate)), up)
        after = "norm" if layer == LAYERS - 1 else f"layers.{layer + 1}.input_norm"
        normed, hidden = build.skip_norm(after, hidden, build.linear(f"{name}.down", wide, HIDDEN, FFN))
    logits = build.linear("lm_head", normed, VOCABULARY, HIDDEN)
    pasts = {
        f"past.{layer}.{part}": ("FLOAT", ("batch", KV_HEADS, "past", WIDTH))
        for layer in range(LAYERS)
        for part in ("key", "value")
    }
    ids = {"ids": ("INT64", ("batch", "length")), "mask": ("INT64", ("batch", "total"))}
    return build.model({**ids, **pasts}, [logits, *cache])


class _Decoder(GraphBuilder):
    def __init__(self, bits: int | None) -> None:
        super().__init__()
        self._bits = bits
        angles = np.arange(POSITIONS)[:, None] / 100.0 ** (np.arange(WIDTH // 2) / (WIDTH // 2))
        self.constant("cos", np.cos(angles).astype(np.float32))
        self.constant("sin", np.sin(angles).astype(np.float32))

    def embedding(self) -> str:
        seen = self.node("ReduceSum", "mask", self.constant("one", np.array([1])), keepdims=0)
        lengths = self.node("Sub", seen, "one")
        self.lengths = self.node("Cast", lengths, to=TensorProto.INT32)
        total = self.node("Gather", self.node("Shape", "mask"), self.constant("second", np.array(1)), axis=0)
        self.total = self.node("Cast", total, to=TensorProto.INT32)
        if self._bits is None:
            return self.node("Gather", self.weight("embed", VOCABULARY, HIDDEN), "ids")
        blocks = HIDDEN // 16
        codes = self.weight("embed.codes", VOCABULARY, HIDDEN * self._bits // 8, dtype="uint8")
        scales = self.weight("embed.scales", VOCABULARY, blocks)
        return self.fused(
            "GatherBlockQuantized", codes, "ids", scales, block_size=16, bits=self._bits, quantize_axis=1
        )

    def linear(self, name: str, source: str, rows: int, inner: int) -> str:
        if self._bits is None:
            return self.node("MatMul", source, self.weight(name, inner, rows))
        blocks = inner // 16
        codes = self.weight(f"{name}.codes", rows, blocks, 16 * self._bits // 8, dtype="uint8")
        scales = self.weight(f"{name}.scales", rows * blocks)
        return self.fused(
            "MatMulNBits", source, codes, scales, K=inner, N=rows, bits=self._bits, block_size=16
        )

    def skip_norm(self, name: str, hidden: str, added: str) -> tuple[str, str]:
        normed, _, _, total = self.fused(
            "SkipSimplifiedLayerNormalization", hidden, added, self.weight(name, HIDDEN), outputs=4
        )
        return normed, total

    def attention(self, name: str, source: str, packed: bool) -> tuple[str, list[str]]:
        if packed:
            operands = [self.linear(f"{name}.qkv", source, (HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN), "", ""]
        else:
            heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
            operands = [self.linear(f"{name}.{k}", source, n * WIDTH, HIDDEN) for k, n in heads.items()]
        index = name.split(".")[1]
        attended, *presents = self.fused(
            "GroupQueryAttention",
            *operands,
            f"past.{index}.key",
            f"past.{index}.value",
            self.lengths,
            self.total,
            "cos",
            "sin",
            outputs=3,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        return self.linear(f"{name}.o", attended, HIDDEN, HEADS * WIDTH), presents
