"""Both front ends say the same of the same model, and the fused operators of onnxruntime what they are made of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from onnx_models import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, GraphBuilder, genai_decoder
from tiny_models import randomized
from torch import nn

from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.trace.fx import trace_module
from graphprune.trace.onnx import trace_onnx

IDS = torch.arange(22).reshape(2, 11) + 3
OPEN = torch.export.Dim.DYNAMIC
COMMON = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def table(groups: NodeGroups) -> Counter[tuple[str, int, bool, int]]:
    """Count groups by kind, size, whether prunable, and how many parameters they reach."""
    return Counter(
        (group.kind, group.size, group.prunable, sum(member.role == "parameter" for member in group.members))
        for group in groups.values()
    )


def with_head_stored_twice(groups: Counter[Any], vocabulary: int) -> Counter[Any]:
    """A tied head is a parameter of its own once the exporter has transposed it: one more member of the residual
    width, and rows of its own that reach the logits; the embedding's rows are read by number in any case."""
    (hidden,) = [row for row in groups if row[0] == "hidden"]
    kind, size, prunable, members = hidden
    return (
        groups
        - Counter([hidden])
        + Counter([(kind, size, prunable, members + 1), ("other", vocabulary, False, 1)])
    )


class Convolutions(nn.Module):
    """Two convolutions with batch norms and a residual connection, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.second_norm = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        y = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


def llama(**changes: Any) -> nn.Module:
    settings = {
        **COMMON,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "use_cache": False,
        **changes,
    }
    return randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        **COMMON, n_embd=24, n_layer=2, n_head=4, n_inner=40, n_positions=32, use_cache=False
    )
    return randomized(transformers.GPT2LMHeadModel(config))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **COMMON,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return randomized(transformers.BertModel(config))


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}
INPUTS = {
    "llama": {"input_ids": IDS},
    "gpt2": {"input_ids": IDS},
    "bert": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
}


@pytest.fixture(scope="module", params=MODELS)
def both(request):
    model, inputs = MODELS[request.param](), INPUTS[request.param]
    expected = table(node_groups(trace_module(model, inputs)))
    # torch shares the tied table; the exporter stores the head transposed
    return model, inputs, with_head_stored_twice(expected, 61) if request.param == "gpt2" else expected


def exported(model: nn.Module, inputs: dict[str, Any], opset: int, *, optimize: bool = True) -> ir.Model:
    shapes = {name: {0: OPEN, 1: OPEN} if value.dim() == 2 else {0: OPEN} for name, value in inputs.items()}
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            optimize=optimize,
            verbose=False,
        )
    return program.model


@pytest.mark.parametrize("opset", [pytest.param(18, marks=pytest.mark.slow), 23])
def test_both_front_ends_find_the_same_groups(both, opset):
    model, inputs, expected = both
    assert table(node_groups(trace_onnx(exported(model, inputs, opset)))) == expected


def test_both_front_ends_find_the_same_groups_in_what_transformers_exports():
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx")
    model, inputs = llama(), dict(INPUTS["llama"])
    expected = table(node_groups(trace_module(model, inputs)))
    program = exporters.OnnxExporter().export(model, inputs, exporters.OnnxConfig(dynamic=True)).program
    found = table(node_groups(trace_onnx(getattr(program, "model", program))))
    assert found == expected


def test_convolutions_with_batch_norms():
    torch.manual_seed(0)
    model, inputs = Convolutions().eval(), {"x": torch.randn(2, 3, 16, 16)}
    expected = table(node_groups(trace_module(model, inputs)))
    assert table(node_groups(trace_onnx(exported(model, inputs, 18, optimize=False)))) == expected
    folded = node_groups(trace_onnx(exported(model, inputs, 18)))
    # The optimizer folds each batch norm into its convolution, so that its scale and shift are gone.
    assert Counter((g.kind, g.size, g.prunable) for g in folded.values()) == Counter(
        (kind, size, prunable) for kind, size, prunable, _ in expected.elements()
    )
    assert Counter(g.size for g in folded.values() if g.prunable) == {8: 1, 12: 1}


def test_a_genai_decoder_has_the_groups_of_the_same_llama():
    settings = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
    }
    expected = table(node_groups(trace_module(llama(**settings), INPUTS["llama"])))
    groups = node_groups(trace_onnx(genai_decoder()))
    assert table(groups) == expected
    packed = node_groups(trace_onnx(genai_decoder(packed=True)))
    assert Counter((g.kind, g.size, g.prunable) for g in packed.values()) == Counter(
        (kind, size, prunable) for kind, size, prunable, _ in expected.elements()
    )


QUANTIZED = {  # blocks of 16: 64 = 4 blocks, 96 = 6 blocks; a head of 16 is one block of the output projection
    ("hidden", 4): 1,
    ("attention_heads", 2): LAYERS,
    ("query_heads", 2): LAYERS,
    ("head_dim", 8): LAYERS,
    ("ffn", 6): LAYERS,
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_units_along_quantized_axes_are_whole_blocks(bits, packed):
    groups = node_groups(trace_onnx(genai_decoder(bits, packed)))
    assert Counter((group.kind, group.size) for group in groups.values() if group.prunable) == QUANTIZED
    hidden = next(group for group in groups.values() if group.prunable and group.kind == "hidden")
    per_unit = {member.parameter: member.indices_per_unit for member in hidden.members}
    assert per_unit["norm"] == 16
    assert per_unit["layers.0.down.codes"] == 16
    assert per_unit["layers.0.gate.codes"] == 1
    reasons = {group.reason for group in groups.values() if not group.prunable}
    assert {"packed codes", "a quantization block is kept or removed as a whole"} <= reasons


def fused_bert(heads: int = 4, width: int = 24, ffn: int = 40) -> ir.Model:
    """One BERT layer as onnxruntime's optimizer fuses it."""
    build = GraphBuilder()

    def norm(name):
        return build.weight(f"{name}.scale", width), build.weight(f"{name}.shift", width)

    tables = [
        build.weight(name, rows, width) for name, rows in (("words", 61), ("positions", 32), ("types", 2))
    ]
    hidden, _ = build.fused("EmbedLayerNormalization", "ids", "types_of", *tables, *norm("embed"), outputs=2)
    qkv = build.weight("qkv", width, 3 * width), build.weight("qkv.bias", 3 * width)
    attended = build.fused("Attention", hidden, *qkv, num_heads=heads)
    projected = build.node("MatMul", attended, build.weight("out", width, width))
    hidden = build.fused(
        "SkipLayerNormalization", projected, hidden, *norm("one"), build.weight("out.bias", width)
    )
    wide = build.fused(
        "BiasGelu", build.node("MatMul", hidden, build.weight("up", width, ffn)), build.weight("up.bias", ffn)
    )
    narrow = build.fused("FusedMatMul", wide, build.weight("down", width, ffn), transB=1)
    result = build.fused("SkipLayerNormalization", narrow, hidden, *norm("two"))
    pooled = build.node(
        "Gemm",
        build.node("ReduceMean", result, build.constant("axes", [1]), keepdims=0),
        build.weight("pool", 7, width),
        transB=1,
    )
    ids = dict.fromkeys(("ids", "types_of"), ("INT32", ("batch", "length")))
    return build.model(ids, [pooled])


def test_a_bert_as_onnxruntime_fuses_it():
    groups = node_groups(trace_onnx(fused_bert()))
    prunable = {
        (group.kind, group.size): {(m.parameter, m.side) for m in group.members}
        for group in groups.values()
        if group.prunable
    }
    assert prunable == {
        ("attention_heads", 4): {("qkv", "produces"), ("qkv.bias", "carries"), ("out", "consumes")},
        ("head_dim", 6): prunable["head_dim", 6],
        ("ffn", 40): {("up", "produces"), ("up.bias", "carries"), ("down", "consumes")},
    }
    widths = [{m.parameter for m in g.members} for g in groups.values() if g.kind == "head_dim"]
    assert sorted(map(len, widths)) == [2, 3]  # query with key; value with the output projection
    hidden = next(group for group in groups.values() if group.kind == "hidden")
    assert "LayerNorm" in hidden.reason
    assert {m.parameter for m in hidden.members} >= {
        "words",
        "types",
        "embed.scale",
        "out.bias",
        "two.shift",
        "pool",
    }


def test_multi_head_attention_with_biases_and_rotated_standard_attention():
    build = GraphBuilder(opset=23)
    operands = [build.node("MatMul", "x", build.weight(name, 24, 24)) for name in "qkv"]
    fused = build.fused("MultiHeadAttention", *operands, build.weight("bias", 72), num_heads=4)
    one = node_groups(trace_onnx(build.model({"x": ("FLOAT", ("b", "s", 24))}, [
        build.node("MatMul", fused, build.weight("o", 24, 5))])))  # fmt: skip
    assert Counter((g.kind, g.size) for g in one.values() if g.prunable) == {
        ("attention_heads", 4): 1,
        ("head_dim", 6): 2,
    }
    build = GraphBuilder(opset=23)
    q, k, v = (
        build.node("MatMul", "x", build.weight(name, 24, heads * 6))
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    )
    tables = build.weight("cos", 32, 3), build.weight("sin", 32, 3)
    q, k = (
        build.node("RotaryEmbedding", s, *tables, "at", num_heads=n, interleaved=1)
        for s, n in ((q, 4), (k, 2))
    )
    fused = build.node("Attention", q, k, v, q_num_heads=4, kv_num_heads=2, is_causal=1)
    inputs = {"x": ("FLOAT", ("b", "s", 24)), "at": ("INT64", ("b", "s"))}
    two = node_groups(
        trace_onnx(build.model(inputs, [build.node("MatMul", fused, build.weight("o", 24, 5))]))
    )
    assert Counter((g.kind, g.size) for g in two.values() if g.prunable) == {
        ("attention_heads", 2): 1,
        ("query_heads", 2): 1,
        ("head_dim", 3): 1,
        ("head_dim", 6): 1,
    }
    (pairs,) = [g for g in two.values() if g.kind == "head_dim" and g.size == 3 and g.prunable]
    q_member = next(m for m in pairs.members if m.parameter == "q")
    assert pairs.indices(q_member, 0).tolist() == [
        0,
        1,
        6,
        7,
        12,
        13,
        18,
        19,
    ]  # neighbours, in each head


def test_an_operator_without_a_rule_is_opaque_by_its_name():
    build = GraphBuilder()
    strange = build.node("Mystery", build.node("MatMul", "x", build.weight("w", 6, 10)), domain="acme")
    wide = build.node("MatMul", "x", build.weight("up", 6, 8))
    model = build.model(
        {"x": ("FLOAT", (5, 6))}, [strange, build.node("MatMul", wide, build.weight("down", 8, 3))]
    )
    groups = node_groups(trace_onnx(model))
    (w,) = [g for g in groups.values() if g.members[0].parameter == "w" and g.size == 10]
    assert not w.prunable
    assert "acme.Mystery" in w.reason
    assert any(g.prunable and g.size == 8 for g in groups.values())


def test_operands_that_do_not_fit_are_opaque_and_do_not_raise():
    build = GraphBuilder()
    y = build.node("Add", build.node("MatMul", "x", build.weight("w", 6, 10)), build.weight("b", 9))
    graph = trace_onnx(build.model({"x": ("FLOAT", (5, 6))}, [y]))
    groups = node_groups(graph)
    (w,) = [g for g in groups.values() if g.members[0].parameter == "w" and g.size == 10]
    assert "onnx.Add" in w.reason
    assert "shapes unknown" in w.reason


def test_a_quantized_weight_behind_dequantize_linear_keeps_its_sides():
    build = GraphBuilder()

    def linear(source: str, name: str, inner: int, rows: int) -> str:
        codes = build.weight(f"{name}.codes", inner, rows, dtype="uint8")
        scales = build.weight(f"{name}.scales", inner // 4, rows)
        return build.node(
            "MatMul", source, build.node("DequantizeLinear", codes, scales, axis=0, block_size=4)
        )

    wide = build.node("Relu", linear("x", "up", 8, 12))
    groups = node_groups(trace_onnx(build.model({"x": ("FLOAT", ("b", 8))}, [linear(wide, "down", 12, 8)])))
    (blocks,) = [group for group in groups.values() if group.prunable]
    assert blocks.size == 3
    sides = {(m.parameter, m.axis): (m.side, m.indices_per_unit) for m in blocks.members}
    assert sides["up.codes", 1] == ("produces", 4)
    assert sides["down.codes", 0] == ("consumes", 4)
    assert sides["down.scales", 0][1] == 1
    assert np.array_equal(blocks.indices(blocks.members[0], 1), np.arange(4, 8))


def test_sums_see_through_products_attention_and_fused_norms():
    """A norm over a width that a product or attention makes may lose units; one after a sigmoid may not."""
    build = GraphBuilder(opset=23)

    def normed(source: str, name: str, width: int) -> str:
        scaled = build.node("RMSNormalization", source, build.weight(f"{name}.scale", width))
        return build.node("MatMul", scaled, build.weight(f"{name}.out", width, 5))

    up, gate, lone = (
        build.node("MatMul", "x", build.weight(name, 24, 10)) for name in ("up", "gate", "lone")
    )
    q, k, v = (build.node("MatMul", "x", build.weight(name, 24, 24)) for name in "qkv")
    attended = build.node("Attention", q, k, v, q_num_heads=4, kv_num_heads=4)
    results = [
        normed(build.node("Mul", up, gate), "product", 10),
        normed(build.node("Sigmoid", lone), "sigmoid", 10),
        normed(attended, "attention", 24),
    ]
    groups = node_groups(trace_onnx(build.model({"x": ("FLOAT", ("b", "s", 24))}, results)))
    prunable = {m.parameter for group in groups.values() if group.prunable for m in group.members}
    assert {"up", "gate", "v", "attention.scale"} <= prunable
    assert not {"lone", "sigmoid.scale"} & prunable
    (width,) = [
        g for g in groups.values() if g.kind == "head_dim" and "v" in {m.parameter for m in g.members}
    ]
    assert width.prunable


def test_what_a_gemm_adds_is_coupled_with_its_rows():
    build = GraphBuilder()
    wide = build.node(
        "Relu", build.node("Gemm", "x", build.weight("up", 10, 6), build.weight("bias", 10), transB=1)
    )
    model = build.model({"x": ("FLOAT", ("b", 6))}, [build.node("Gemm", wide, build.weight("down", 10, 6))])
    (ffn,) = [group for group in node_groups(trace_onnx(model)).values() if group.prunable]
    assert {(m.parameter, m.axis, m.side) for m in ffn.members} == {
        ("up", 0, "produces"),
        ("bias", 0, "carries"),
        ("down", 0, "consumes"),
    }


@pytest.mark.parametrize(("opset", "rows"), [(18, 4), (21, 12)])
def test_group_norm_may_lose_groups_but_no_channel_of_one(opset, rows):
    """Its weight has a row for each group before opset 21, for each channel since."""
    build = GraphBuilder(opset)
    wide = build.node("Conv", "x", build.weight("up", 12, 5, 3))
    scale, shift = build.weight("scale", rows), build.weight("shift", rows)
    normed = build.node("GroupNormalization", wide, scale, shift, num_groups=4)
    model = build.model(
        {"x": ("FLOAT", ("b", 5, 9))}, [build.node("Conv", normed, build.weight("down", 3, 12, 3))]
    )
    groups = node_groups(trace_onnx(model))
    (whole,) = [group for group in groups.values() if group.size == 4]
    (channel,) = [
        group for group in groups.values() if group.size == 3 and "GroupNorm" in (group.reason or "")
    ]
    assert (whole.prunable, channel.permutable, channel.prunable) == (True, True, False)
    per_unit = {m.parameter: m.indices_per_unit for m in whole.members}
    assert per_unit == {"up": 3, "scale": rows // 4, "shift": rows // 4, "down": 3}
    assert {m.parameter for m in channel.members} == {"up", "down"} | (
        {"scale", "shift"} if rows == 12 else set()
    )
    assert channel.indices(channel.members[0], 1).tolist() == [1, 4, 7, 10]


@pytest.mark.parametrize("channels", [True, False])
def test_instance_norm_may_lose_channels_but_no_positions(channels):
    build = GraphBuilder()
    wide = build.node("MatMul", "x", build.weight("up", 5, 9))
    turned = build.node("Transpose", wide, perm=[0, 2, 1]) if channels else wide
    rows = 9 if channels else 7
    normed = build.node(
        "InstanceNormalization", turned, build.weight("scale", rows), build.weight("shift", rows)
    )
    back = build.node("Transpose", normed, perm=[0, 2, 1]) if channels else normed
    model = build.model(
        {"x": ("FLOAT", ("b", 7, 5))}, [build.node("MatMul", back, build.weight("down", 9, 3))]
    )
    (waist,) = [group for group in node_groups(trace_onnx(model)).values() if group.size == 9]
    assert (waist.permutable, waist.prunable) == (True, channels)
    assert {m.parameter for m in waist.members} == {"up", "down"} | (
        {"scale", "shift"} if channels else set()
    )
