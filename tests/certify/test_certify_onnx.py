"""The permutation check on ONNX models: right groups pass, and a rule that forgets a demand does not."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import GraphBuilder, genai_decoder

from graphprune.certify.onnx import permutation_error
from graphprune.coupling import analysis
from graphprune.coupling.groups import node_groups
from graphprune.errors import CouplingError
from graphprune.trace.onnx import trace_onnx


def decoder_inputs(past: int = 0):
    generator = np.random.default_rng(0)
    caches = {
        f"past.{layer}.{part}": generator.standard_normal((1, 2, past, 16)).astype(np.float32)
        for layer in (0, 1)
        for part in ("key", "value")
    }
    length = 1 if past else 7
    ids = {"ids": generator.integers(0, 61, (1, length)), "mask": np.ones((1, past + length), np.int64)}
    return {**ids, **caches}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("past", [0, 5])
def test_a_genai_decoder_is_the_same_after_renumbering_its_units(bits, packed, past):
    groups = node_groups(trace_onnx(genai_decoder(bits, packed)))
    error = permutation_error(groups, decoder_inputs(past))
    assert 0 < error < 1e-5


FORGETFUL = {  # each rule, and what it returns when it couples nothing
    "com.microsoft.SkipSimplifiedLayerNormalization": lambda operator, algebra: tuple(
        list(algebra[operator["input"]]) if i in (0, 3) else algebra.fresh(value.shape)
        for i, value in enumerate(operator.outputs)
    ),
    "onnx.MatMul": lambda operator, algebra: [*algebra[operator["A"]][:-1], algebra[operator["B"]][1]],
    "onnx.Mul": lambda operator, algebra: list(algebra[operator["A"]]),
}


@pytest.mark.parametrize("target", FORGETFUL)
def test_a_rule_that_forgets_a_demand_is_caught(target, monkeypatch):
    real = analysis.rule_for
    monkeypatch.setattr(
        analysis, "rule_for", lambda name: FORGETFUL[target] if name == target else real(name)
    )
    groups = node_groups(trace_onnx(genai_decoder()))
    assert permutation_error(groups, decoder_inputs()) > 1e-3


def test_one_group_alone_and_none_at_all():
    groups = node_groups(trace_onnx(genai_decoder()))
    ffn = next(group for group in groups.values() if group.kind == "ffn")
    assert permutation_error(groups, decoder_inputs(), only=ffn) < 1e-5
    build = GraphBuilder()
    model = build.model({"x": ("FLOAT", (2, 6))}, [build.node("MatMul", "x", build.weight("w", 6, 6))])
    with pytest.raises(CouplingError, match="no group"):
        permutation_error(node_groups(trace_onnx(model)), {"x": np.ones((2, 6), np.float32)})
