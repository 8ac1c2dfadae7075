"""Surgery on ONNX graphs: the smaller file computes what the whole one does with zeros in place of the units."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import GraphBuilder, genai_decoder
from onnx_networks import NETWORKS
from onnx_reference import assert_as_zeroed, assert_valid, cut_caches, in_memory, plans, run, zeroed
from torch import nn

import graphprune
from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.errors import CouplingError, ShrinkError
from graphprune.shrink.plan import Plan
from graphprune.trace.onnx import trace_onnx

STANDARD = {"attention_by_hand", "packed_projections", "heads_apart", "convolutions", "tables"}
GROUPS: dict[str, NodeGroups] = {}


def groups_of(name: str) -> NodeGroups:
    if name not in GROUPS:
        GROUPS[name] = node_groups(trace_onnx(NETWORKS[name]()))
    return GROUPS[name]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "routed_experts"])
@settings(max_examples=6)
@given(data=st.data())
def test_a_cut_graph_computes_what_the_zeroed_one_does(name, data):
    groups = groups_of(name)
    plan = data.draw(plans(groups))
    small = graphprune.shrink(None, groups, plan)
    assert_as_zeroed(groups, small, plan)
    if name in STANDARD:
        assert_valid(small)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_unit_of_the_networks_may_go_and_does(name):
    """No network of this list is there for nothing: each has prunable groups, and their members become smaller."""
    groups = groups_of(name)
    for group in groups.prunable():
        small = graphprune.shrink(None, groups, Plan({group.name: [0]}))
        weights = {
            value.name: value for node in small.graph for value in (*node.inputs, *node.outputs) if value
        }
        for member in group.members:
            if member.side != "selected":
                size = weights[member.parameter].shape[member.axis]
                assert size == member.shape[member.axis] - member.indices_per_unit


def decoder_groups(bits=None, packed=False):
    key = f"decoder {bits} {packed}"
    if key not in GROUPS:
        GROUPS[key] = node_groups(trace_onnx(genai_decoder(bits, packed)))
    return GROUPS[key]


def decoder_inputs(groups, plan, past=0):
    """Return inputs for the whole and for the cut decoder; its kernel takes a batch of 1 beside a cache."""
    generator = np.random.default_rng(0)
    length = 1 if past else 7
    inputs = {"ids": generator.integers(0, 61, (1, length)), "mask": np.ones((1, past + length), np.int64)}
    for name, _ in groups.graph.states:
        inputs[name] = generator.standard_normal((1, 2, past, 16)).astype(np.float32)
    return inputs, cut_caches(groups, inputs, plan)


@pytest.mark.parametrize(("bits", "packed", "past"), [(None, True, 5), (4, False, 5), (8, True, 0)])
@settings(max_examples=5)
@given(data=st.data())
def test_a_genai_decoder_computes_what_the_zeroed_one_does(bits, packed, past, data):
    groups = decoder_groups(bits, packed)
    removed = dict(data.draw(plans(groups)))
    widths = [name for name in removed if groups[name].kind == "head_dim"]
    plan = Plan({name: units for name, units in removed.items() if name not in widths})
    small = graphprune.shrink(None, groups, plan)
    whole, cut = decoder_inputs(groups, plan, past)
    outputs = [value.name for value in groups.graph.outputs if value.name not in groups.graph.state_names]
    (expected,), (found,) = (
        run(zeroed(groups, plan), whole, outputs),
        run(in_memory(small), cut, outputs),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_grouped_query_attention_loses_widths_of_keys_and_values_together():
    build = GraphBuilder()
    operands = [
        build.node("MatMul", "x", build.weight(n, 12, 16 * heads)) for n, heads in zip("qkv", (4, 2, 2))
    ]
    pasts = ["past.k", "past.v"]
    attended, *presents = build.fused(
        "GroupQueryAttention", *operands, *pasts, "last", "total", outputs=3, num_heads=4, kv_num_heads=2
    )
    inputs = {"x": ("FLOAT", (1, "length", 12)), "last": ("INT32", (1,)), "total": ("INT32", ())}
    inputs |= dict.fromkeys(pasts, ("FLOAT", (1, 2, "past", 16)))
    product = build.node("MatMul", attended, build.weight("o", 64, 5))
    groups = node_groups(trace_onnx(build.model(inputs, [product, *presents])))
    widths = [group for group in groups.prunable() if group.kind == "head_dim"]
    plan = Plan({group.name: range(number, number + 8) for number, group in enumerate(widths)})
    assert len(plan) == 2
    small = graphprune.shrink(None, groups, plan)
    assert [tuple(value.shape)[1::2] for value in small.graph.inputs if len(value.shape) == 4] == [(2, 8)] * 2
    generator = np.random.default_rng(0)
    feeds = {"x": generator.standard_normal((1, 1, 12)).astype(np.float32)}
    feeds |= {name: generator.standard_normal((1, 2, 3, 16)).astype(np.float32) for name in pasts}
    feeds |= {"last": np.array([3], np.int32), "total": np.array(4, np.int32)}
    np.testing.assert_allclose(
        run(in_memory(small), cut_caches(groups, feeds, plan), [product])[0],
        run(zeroed(groups, plan), feeds, [product])[0],
        atol=1e-5,
    )
    for group in widths:
        with pytest.raises(ShrinkError, match=r"\(GroupQueryAttention\) cannot follow.*a multiple of 8"):
            graphprune.shrink(None, groups, Plan({group.name: [0]}))


def test_the_input_is_left_as_it_was_and_the_result_is_cut_again(tmp_path):
    model = genai_decoder()
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    groups = node_groups(trace_onnx(path))
    ffn = [group.name for group in groups.prunable() if group.kind == "ffn"]
    first, later = Plan({ffn[0]: range(20)}), Plan({ffn[0]: [3, 5], ffn[1]: [0]})
    once = graphprune.shrink(path, groups, first)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    small = node_groups(trace_onnx(once))
    twice = graphprune.shrink(once, small, later)
    at_once = graphprune.shrink(model, groups, first.then(later, groups))
    inputs, _ = decoder_inputs(groups, Plan({}))
    results = [run(in_memory(each), inputs, [groups.graph.outputs[0].name])[0] for each in (twice, at_once)]
    np.testing.assert_array_equal(*results)


def test_removing_nothing_is_bitwise_nothing():
    groups = decoder_groups()
    small = graphprune.shrink(None, groups, Plan({}))
    assert in_memory(small).graph.node == in_memory(groups.graph.program).graph.node
    assert in_memory(small).graph.initializer == in_memory(groups.graph.program).graph.initializer


def test_what_does_not_fit_the_groups_is_refused():
    groups = decoder_groups()
    (ffn, *_) = [group.name for group in groups.prunable() if group.kind == "ffn"]
    with pytest.raises(CouplingError, match="a Linear is not"):
        graphprune.shrink(nn.Linear(2, 2), groups, Plan({}))
    with pytest.raises(CouplingError, match=r"of another model.*GatherBlockQuantized"):
        graphprune.shrink(genai_decoder(4), groups, Plan({}))
    with pytest.raises(ShrinkError, match="ONNX model keeps at least one"):
        graphprune.shrink(None, groups, Plan({ffn: range(96)}, whole=True))
