"""The permutation check on ONNX models: right groups pass, and a rule that forgets a demand does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_models import GraphBuilder, genai_decoder
from onnx_networks import NETWORKS
from onnx_reference import example_inputs

from graphprune.certify.certificate import certify
from graphprune.certify.onnx import permutation_error
from graphprune.coupling import analysis
from graphprune.coupling.groups import node_groups
from graphprune.errors import CouplingError, InputsError, VerificationError
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


@pytest.mark.parametrize("name", NETWORKS)
def test_removal_is_compared_with_zeroing(name):
    groups = node_groups(trace_onnx(NETWORKS[name]()))
    certificate = certify(None, groups, example_inputs(groups.graph))
    certificate.raise_if_failed()
    assert certificate.pruned_groups == len(groups.prunable())
    assert certificate.removed_effect > 1e-3


def test_groups_that_a_kernel_takes_whole_only_are_not_removed_for_the_check():
    groups = node_groups(trace_onnx(genai_decoder()))
    certificate = certify(None, groups, decoder_inputs())
    widths = [group for group in groups.prunable() if group.kind == "head_dim"]
    assert certificate.pruned_groups == len(groups.prunable()) - len(widths)
    assert certificate.ok


@pytest.mark.parametrize("target", FORGETFUL)
def test_a_rule_that_forgets_a_demand_fails_by_removal_too(target, monkeypatch):
    real = analysis.rule_for
    monkeypatch.setattr(
        analysis, "rule_for", lambda name: FORGETFUL[target] if name == target else real(name)
    )
    groups = node_groups(trace_onnx(genai_decoder()))
    certificate = certify(None, groups, decoder_inputs())
    assert not certificate.removed_max_error <= certificate.tolerance
    with pytest.raises(VerificationError, match="removal differs from zeroing"):
        certificate.raise_if_failed()


def test_members_that_are_not_zeroed_are_caught():
    """A group that names only half of what it reaches is cut right, and does not do what zeroing its members does."""
    groups = node_groups(trace_onnx(NETWORKS["packed_projections"]()))
    (group, *_) = groups.prunable()
    groups._groups[group.name] = replace(group, members=group.consumers[:0])
    certificate = certify(None, groups, example_inputs(groups.graph))
    assert group.name in certificate.failures
    assert certificate.removed_max_error > 1e-3


def test_weights_may_be_those_of_another_file_of_the_same_graph():
    groups = node_groups(trace_onnx(NETWORKS["packed_projections"]()))
    inputs, other = example_inputs(groups.graph), NETWORKS["packed_projections"]()
    for value in other.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy() + 1, name=value.name)
    here, there = certify(None, groups, inputs), certify(other, groups, inputs)
    assert here.ok
    assert there.ok
    assert here.removed_effect != there.removed_effect


def test_a_model_that_onnxruntime_refuses_is_an_error_of_ours():
    build = GraphBuilder()
    wide = build.node("MatMul", "x", build.weight("up", 6, 8))
    strange = build.node("Neg", build.node("Mystery", "x", domain="acme"))
    model = build.model(
        {"x": ("FLOAT", (2, 6))}, [build.node("MatMul", wide, build.weight("down", 8, 3)), strange]
    )
    groups = node_groups(trace_onnx(model))
    with pytest.raises(VerificationError, match=r"onnxruntime cannot run the model: .*Mystery"):
        certify(None, groups, {"x": np.ones((2, 6), np.float32)})
