"""Small ONNX graphs, each of which tells operators sizes in its own way; all of them run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, numpy_helper
from onnx_models import GraphBuilder

Network = Callable[[], ir.Model]
NETWORKS: dict[str, Network] = {}
X = {"x": ("FLOAT", ("batch", "length", 12))}
IMAGE = {"x": ("FLOAT", ("batch", 3, 6, 6))}


def network(function: Network) -> Network:
    NETWORKS[function.__name__] = function
    return function


def _numbers(build: GraphBuilder, *numbers: int) -> str:
    return build.constant(f"numbers_{len(build.initializers)}", np.array(numbers, np.int64))


def _size(build: GraphBuilder, source: str, axis: int) -> str:
    return build.node("Gather", build.node("Shape", source), _numbers(build, axis), axis=0)


def _linear(build: GraphBuilder, source: str, name: str, inner: int, rows: int) -> str:
    product = build.node("MatMul", source, build.weight(name, inner, rows))
    return build.node("Add", product, build.weight(f"{name}.bias", rows))


@network
def attention_by_hand() -> ir.Model:
    """Grouped heads, repeated by Expand; shape vectors hold the batch, and both are shared by all that read them."""
    build = GraphBuilder(18)
    batch, length = _size(build, "x", 0), _size(build, "x", 1)
    width = _numbers(build, 4)
    by_heads = build.node("Concat", batch, length, _numbers(build, 4), width, axis=0)
    by_key_heads = build.node("Concat", batch, length, _numbers(build, 2, -1), axis=0)
    repeated = build.node("Concat", batch, _numbers(build, 2, 2), length, width, axis=0)
    merged = build.node("Concat", batch, _numbers(build, 4), length, width, axis=0)
    heads = []
    for name, rows, shape in (("q", 16, by_heads), ("k", 8, by_key_heads), ("v", 8, by_key_heads)):
        apart = build.node("Reshape", _linear(build, "x", name, 12, rows), shape)
        heads.append(build.node("Transpose", apart, perm=[0, 2, 1, 3]))
    query = heads[0]
    key, value = (
        build.node(
            "Reshape",
            build.node("Expand", build.node("Unsqueeze", one, _numbers(build, 2)), repeated),
            merged,
        )
        for one in heads[1:]
    )
    turned = build.node("Transpose", key, perm=[0, 1, 3, 2])
    root = build.node("Sqrt", build.node("Cast", _size(build, query, 3), to=TensorProto.FLOAT))
    scores = build.node("Softmax", build.node("Div", build.node("MatMul", query, turned), root), axis=-1)
    attended = build.node("Transpose", build.node("MatMul", scores, value), perm=[0, 2, 1, 3])
    flat = build.node("Reshape", attended, _numbers(build, 0, 0, 16))
    return build.model(X, [build.node("MatMul", flat, build.weight("o", 16, 5))])


@network
def packed_projections() -> ir.Model:
    """One product cut by Split at sizes, another in equal parts, a third by two slices, whose middle is computed."""
    build = GraphBuilder(18)
    first = build.node("Split", _linear(build, "x", "a", 12, 15), _numbers(build, 5, 10), axis=-1, outputs=2)
    second = build.node("Split", _linear(build, "x", "b", 12, 14), axis=2, num_outputs=2, outputs=2)
    third = _linear(build, "x", "c", 12, 18)
    middle = build.node("Div", _size(build, third, 2), _numbers(build, 2))
    halves = [
        build.node("Slice", third, _numbers(build, 0), middle, _numbers(build, 2)),
        build.node("Slice", third, middle, _numbers(build, 2**62), _numbers(build, -1), _numbers(build, 1)),
    ]
    results = [
        build.node("MatMul", part, build.weight(f"out.{i}", width, 4))
        for i, (part, width) in enumerate([(first[0], 5), (first[1], 10)])
    ]
    for i, (gate, up, width) in enumerate([(*second, 7), (*halves, 9)]):
        results.append(
            build.node("MatMul", build.node("Mul", gate, up), build.weight(f"gated.{i}", width, 4))
        )
    return build.model(X, results)


@network
def norms() -> ir.Model:
    """Norms over a width that shrinks, fused and written out, of numbers so small that epsilon matters."""
    build = GraphBuilder(23)
    hidden = build.node("Mul", _linear(build, "x", "in", 12, 10), build.constant("small", np.float32(0.01)))
    skip = build.node("MatMul", "x", build.weight("skip", 12, 10))
    square = build.node("Pow", hidden, build.constant("two", np.float32(2)))
    mean = build.node("ReduceMean", square, _numbers(build, -1), keepdims=1)
    root = build.node("Sqrt", build.node("Add", mean, build.constant("epsilon", np.float32(1e-3))))
    by_hand = build.node("Mul", build.node("Div", hidden, root), build.weight("n.0", 10))
    scale = build.node("Add", build.weight("n.1", 10), build.constant("one", np.float32(1)))
    fused = build.node("RMSNormalization", hidden, scale, axis=-1, epsilon=1e-3)
    simplified = build.node("SimplifiedLayerNormalization", hidden, build.weight("n.2", 10), axis=-1)
    default = build.node("RMSNormalization", hidden, build.weight("n.3", 10))
    skipped, _, _, total = build.fused(
        "SkipSimplifiedLayerNormalization", hidden, skip, build.weight("n.4", 10), outputs=4, epsilon=1e-2
    )
    results = [
        build.node("MatMul", normed, build.weight(f"out.{i}", 10, 4))
        for i, normed in enumerate([by_hand, fused, simplified, default, skipped, total])
    ]
    return build.model(X, [*results, build.node("ReduceMean", total, _numbers(build, 2), keepdims=0)])


@network
def skip_norm_of_almost_nothing() -> ir.Model:
    """The epsilon that onnxruntime's fused norm has where none is given."""
    build = GraphBuilder()
    tiny = build.node("Mul", _linear(build, "x", "in", 12, 10), build.constant("tiny", np.float32(1e-6)))
    normed = build.fused("SkipSimplifiedLayerNormalization", tiny, tiny, build.weight("n", 10))
    return build.model(X, [build.node("MatMul", normed, build.weight("out", 10, 4))])


@network
def standard_attention() -> ir.Model:
    """Attention of opset 23 with a cache, its heads counted by attributes; rotated in halves, in pairs, and in part."""
    build = GraphBuilder(23)
    results: list[str] = []
    inputs: dict[str, Any] = {**X, "at": ("INT64", ("batch", "length"))}
    angles = np.arange(16)[:, None] / 10.0 ** np.arange(3)
    for name, pairs, settings in (
        ("half", 3, {}),
        ("pair", 3, {"interleaved": 1}),
        ("part", 2, {"rotary_embedding_dim": 4}),
    ):
        cos, sin = (
            build.constant(f"{name}.{wave.__name__}", wave(angles[:, :pairs]).astype(np.float32))
            for wave in (np.cos, np.sin)
        )
        query, key = (
            build.node(
                "RotaryEmbedding",
                build.node("MatMul", "x", build.weight(f"{name}.{part}", 12, heads * 6)),
                *(cos, sin, "at"),
                num_heads=heads,
                **settings,
            )
            for part, heads in (("q", 4), ("k", 2))
        )
        value = build.node("MatMul", "x", build.weight(f"{name}.v", 12, 10))
        pasts = {f"past.{name}.k": 6, f"past.{name}.v": 5}
        inputs |= {past: ("FLOAT", ("batch", 2, "past", width)) for past, width in pasts.items()}
        attended, *presents = build.node(
            "Attention", query, key, value, "", *pasts, outputs=3, q_num_heads=4, kv_num_heads=2
        )
        results += [build.node("MatMul", attended, build.weight(f"{name}.o", 20, 5)), *presents]
    return build.model(inputs, results)


@network
def heads_apart() -> ir.Model:
    """Attention of opset 23 on four axes, with one bias for each head: a table that is no parameter's."""
    build = GraphBuilder(23)
    operands = [
        build.node(
            "Transpose",
            build.node("Reshape", _linear(build, "x", name, 12, 20), _numbers(build, 0, 0, 4, 5)),
            perm=[0, 2, 1, 3],
        )
        for name in "qkv"
    ]
    slopes = build.node(
        "Reshape", build.constant("slopes", np.float32([0.5, 0.2, 0.1, 0.7])), _numbers(build, 4, 1, 1)
    )
    far = build.node("Cast", build.node("Range", build.constant("0", np.int64(0)), build.node(
        "Squeeze", _size(build, "x", 1)), build.constant("1", np.int64(1))), to=TensorProto.FLOAT)  # fmt: skip
    square = build.node("Concat", _numbers(build, 1, 4), *[_size(build, "x", 1)] * 2, axis=0)
    bias = build.node("Expand", build.node("Mul", slopes, far), square)
    attended = build.node("Attention", *operands, bias)
    flat = build.node(
        "Reshape", build.node("Transpose", attended, perm=[0, 2, 1, 3]), _numbers(build, 0, 0, -1)
    )
    return build.model(X, [build.node("MatMul", flat, build.weight("o", 20, 5))])


@network
def fused_attention() -> ir.Model:
    """Attention of com.microsoft: operands apart with a bias, projected by one weight, and rotated."""
    build = GraphBuilder()
    apart = [build.node("MatMul", "x", build.weight(f"m.{name}", 12, 24)) for name in "qkv"]
    multi = build.fused("MultiHeadAttention", *apart, build.weight("m.bias", 72), num_heads=4)
    packed = build.fused(
        "Attention", "x", build.weight("a.qkv", 12, 48), build.weight("a.bias", 48), num_heads=4
    )
    angles = np.arange(16)[:, None] / 10.0 ** np.arange(4)
    tables = [build.constant(f.__name__, f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    query, key = (
        build.fused("RotaryEmbedding", _linear(build, "x", f"r.{name}", 12, 16), "at", *tables, num_heads=2)
        for name in "qk"
    )
    rotated = build.fused("MultiHeadAttention", query, key, _linear(build, "x", "r.v", 12, 16), num_heads=2)
    results = [
        build.node("MatMul", source, build.weight(f"out.{i}", width, 5))
        for i, (source, width) in enumerate([(multi, 24), (packed, 16), (rotated, 16)])
    ]
    return build.model({**X, "at": ("INT64", ("batch", "length"))}, results)


@network
def convolutions() -> ir.Model:
    """Grouped, depth-wise and transposed convolutions, norms by group, channel and batch, and resampling."""
    build = GraphBuilder(21)

    def conv(source: str, name: str, *shape: int, op: str = "Conv", **settings: Any) -> str:
        rows = shape[0] if op == "Conv" else shape[1] * settings.get("group", 1)
        return build.node(
            op, source, build.weight(name, *shape), build.weight(f"{name}.bias", rows), **settings
        )

    stem = conv("x", "stem", 12, 3, 3, 3, pads=[1] * 4)
    normed = build.node(
        "GroupNormalization", stem, build.weight("gn.scale", 12), build.weight("gn.shift", 12), num_groups=4
    )
    deep = conv(build.node("Relu", normed), "deep", 12, 1, 3, 3, pads=[1] * 4, group=12)
    grouped = conv(deep, "grouped", 16, 3, 1, 1, group=4)
    wide = conv(grouped, "wide", 16, 4, 2, 2, op="ConvTranspose", group=2, strides=[2, 2])
    both = build.node("Concat", conv(wide, "one", 6, 8, 1, 1), conv(wide, "two", 10, 8, 1, 1), axis=1)
    scaled = build.node("BatchNormalization", both, *(build.weight(f"bn.{i}", 16) for i in range(3)),
                        build.constant("bn.variance", np.linspace(0.5, 2, 16, dtype=np.float32)))  # fmt: skip
    own = build.node(
        "InstanceNormalization", scaled, build.weight("in.scale", 16), build.weight("in.shift", 16)
    )
    larger = build.node("Resize", own, "", "", build.node(
        "Concat", _size(build, "x", 0), _numbers(build, 16, 15, 15), axis=0))  # fmt: skip
    pooled = build.node("Flatten", build.node("GlobalAveragePool", build.node("Relu", larger)))
    head = build.node("Gemm", pooled, build.weight("head", 5, 16), build.weight("head.bias", 5), transB=1)
    return build.model(IMAGE, [head])


@network
def tables() -> ir.Model:
    """Known indices, one index, copies laid end to end, made by size, and a weight that stands in a node."""
    build = GraphBuilder(18)
    held = np.random.default_rng(1).standard_normal((12, 8)).astype(np.float32)
    source = build.node("MatMul", "x", build.node("Constant", value=numpy_helper.from_array(held)))
    turned = build.node("Gather", source, _numbers(build, 4, 5, 6, 7, 0, 1, 2, 3), axis=2)
    results = [build.node("MatMul", build.node("Mul", turned, source), build.weight("out.0", 8, 4))]
    twice = build.node("Tile", _linear(build, "x", "t", 12, 7), _numbers(build, 1, 1, 2))
    results.append(build.node("MatMul", twice, build.weight("out.1", 14, 4)))
    wide = _linear(build, "x", "z", 12, 9)
    ones = build.node(
        "ConstantOfShape",
        build.node("Shape", wide),
        value=numpy_helper.from_array(np.array([0.5], np.float32)),
    )
    results.append(build.node("MatMul", build.node("Mul", wide, ones), build.weight("out.2", 9, 4)))
    mean = build.node("Div", build.node("ReduceSum", wide, _numbers(build, -1), keepdims=0), build.node(
        "Cast", _size(build, wide, 2), to=TensorProto.FLOAT))  # fmt: skip
    return build.model(X, [*results, mean])


@network
def routed_experts() -> ir.Model:
    """A softmax over experts of which the two best are taken, and summed up over all experts."""
    build = GraphBuilder(18)
    odds = build.node("Softmax", build.node("MatMul", "x", build.weight("router", 12, 6)), axis=-1)
    best, which = build.node("TopK", odds, _numbers(build, 2), axis=-1, outputs=2)
    hot = build.node(
        "ScatterElements",
        build.node("Mul", odds, build.constant("zero", np.float32(0))),
        which,
        best,
        axis=-1,
    )
    return build.model(X, [build.node("MatMul", hot, build.weight("experts", 6, 5))])


@network
def quantized() -> ir.Model:
    """Codes by block: MatMulNBits with zero points, MatMulBnb4, and DequantizeLinear."""
    build = GraphBuilder(21)

    def n_bits(source: str, name: str, inner: int, rows: int) -> str:
        codes = build.weight(f"{name}.codes", rows, inner // 16, 8, dtype="uint8")
        scales = build.weight(f"{name}.scales", rows * (inner // 16))
        return build.fused("MatMulNBits", source, codes, scales, K=inner, N=rows, bits=4, block_size=16)

    def bnb4(source: str, name: str, inner: int, rows: int) -> str:
        codes = build.weight(f"{name}.codes", rows * inner // 2, dtype="uint8")
        absmax = build.weight(f"{name}.absmax", rows * inner // 16)
        settings = {"K": inner, "N": rows, "block_size": 16, "quant_type": 1}
        return build.fused("MatMulBnb4", source, codes, absmax, **settings)

    def dequantized(source: str, name: str, inner: int, rows: int) -> str:
        codes = build.weight(f"{name}.codes", inner, rows, dtype="uint8")
        scales = build.weight(f"{name}.scales", inner // 16, rows)
        whole = build.node("DequantizeLinear", codes, scales, axis=0, block_size=16)
        return build.node("MatMul", source, whole)

    results = []
    for kind in (n_bits, bnb4, dequantized):
        wide = build.node("Relu", kind("x", f"{kind.__name__}.up", 32, 48))
        results.append(kind(wide, f"{kind.__name__}.down", 48, 32))
    return build.model({"x": ("FLOAT", ("batch", "length", 32))}, results)
