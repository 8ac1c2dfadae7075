"""The permutation check on ONNX models: right groups pass, and a rule that forgets a demand does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_models import GraphBuilder, genai_decoder

from graphprune.certify.certificate import certify
from graphprune.certify.onnx import permutation_error
from graphprune.coupling import analysis
from graphprune.coupling.groups import node_groups
from graphprune.errors import CouplingError, InputsError, ShrinkError
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
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


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_a_file_is_certified_on_arrays_and_on_tensors(convert):
    groups = node_groups(trace_onnx(genai_decoder()))
    certificate = certify(None, groups, {name: convert(array) for name, array in decoder_inputs().items()})
    assert certificate.ok
    assert certificate.wrong_members == ()


def test_inputs_of_a_file_that_are_missing_or_unknown_are_named():
    groups = node_groups(trace_onnx(genai_decoder()))
    with pytest.raises(InputsError, match=r"the file's inputs are ids, mask.*; not given: ids"):
        certify(None, groups)
    with pytest.raises(InputsError, match="none is 'input_ids'"):
        certify(None, groups, {**decoder_inputs(), "input_ids": np.zeros((1, 7))})


def test_a_file_cannot_be_cut_yet():
    model = genai_decoder()
    groups = node_groups(trace_onnx(model))
    (name, *_) = [group.name for group in groups.prunable()]
    with pytest.raises(ShrinkError, match=r"an ONNX file, which cannot be cut yet\n.*trace the torch model"):
        shrink(model, groups, Plan({name: [0]}))
