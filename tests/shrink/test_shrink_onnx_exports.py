"""Surgery on what torch exports: the result computes what the zeroed model does, and is a valid file."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_exports import EXPORTS, exported
from onnx_reference import assert_as_zeroed, assert_valid, plans

import graphprune
from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.trace.onnx import trace_onnx


@pytest.fixture(scope="module", params=EXPORTS)
def export(request) -> NodeGroups:
    build, opset, inputs = EXPORTS[request.param]
    return node_groups(trace_onnx(exported(build(), inputs, opset)))


@settings(max_examples=6)
@given(data=st.data())
def test_what_torch_exports_is_cut_and_stays_a_valid_file(export, data):
    plan = data.draw(plans(export))
    small = graphprune.shrink(export.graph.program, export, plan)
    assert_as_zeroed(export, small, plan)
    assert_valid(small)
