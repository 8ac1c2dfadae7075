"""Scores of units of ONNX graphs against their formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import GraphBuilder, genai_decoder
from onnx_networks import NETWORKS
from onnx_reference import example_inputs

from graphprune.coupling.groups import node_groups
from graphprune.errors import RecipeError, TrainingError
from graphprune.saliency.onnx import onnx_scores, readers_of
from graphprune.trace.onnx import trace_onnx

X = {"x": ("FLOAT", ("batch", 6))}
BATCHES = [
    {"x": np.random.default_rng(seed).standard_normal((size, 6)).astype(np.float32)}
    for seed, size in ((0, 7), (1, 4))
]


def mlp(*, transposed: bool):
    """Two layers; the second weight is read as it is, or through a Transpose."""
    build = GraphBuilder(18)
    wide = build.node("Relu", build.node("MatMul", "x", build.weight("up", 6, 8)))
    if transposed:
        down = build.node("Transpose", build.weight("down", 5, 8), perm=[1, 0])
    else:
        down = build.weight("down", 8, 5)
    model = build.model(X, [build.node("MatMul", wide, down)])
    groups = node_groups(trace_onnx(model))
    held = {
        name: value.const_value.numpy().astype(np.float64) for name, value in model.graph.initializers.items()
    }
    inner = np.concatenate([np.maximum(batch["x"] @ held["up"], 0) for batch in BATCHES])
    (group,) = groups.prunable()
    return groups, group.name, held["up"], held["down"].T if transposed else held["down"], inner


@pytest.mark.parametrize("transposed", [False, True])
def test_scores_are_those_of_the_formulas(transposed):
    groups, name, up, down, inner = mlp(transposed=transposed)
    expected = {
        "magnitude": np.sqrt((up**2).sum(0) + (down**2).sum(1)),
        "wanda": np.abs(down).sum(1) * np.sqrt((inner**2).sum(0)),
        "flap": inner.var(0) * (down**2).sum(1),
    }
    expected["magnitude"] /= expected["magnitude"].mean()
    standard = (expected["flap"] - expected["flap"].mean()) / expected["flap"].std(ddof=1)
    expected["flap"] = standard - standard.min()
    for saliency, score in expected.items():
        found = onnx_scores(saliency, groups.graph.program, groups, [name], BATCHES)[name]
        np.testing.assert_allclose(found, score, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", ["convolutions", "attention_by_hand", "standard_attention"])
def test_every_group_of_a_network_is_scored(network):
    groups = node_groups(trace_onnx(NETWORKS[network]()))
    names = [group.name for group in groups.prunable() if group.kind not in ("head_dim", "query_heads")]
    observed = [name for name in names if _is_read(groups, name)]
    scores = onnx_scores("wanda", groups.graph.program, groups, observed, [example_inputs(groups.graph)])
    assert {name: len(score) for name, score in scores.items()} == {
        name: groups[name].size for name in observed
    }
    assert all(float(score.min()) >= 0 < float(score.max()) for score in scores.values())
    assert observed


def _is_read(groups, name):
    try:
        return bool(readers_of(groups.graph.program, groups, [groups[name]]))
    except TrainingError:
        return False


def test_what_cannot_be_scored_is_refused_by_name():
    groups, name, *_ = mlp(transposed=False)
    with pytest.raises(RecipeError, match="no saliency of ONNX graphs 'fisher'"):
        onnx_scores("fisher", groups.graph.program, groups, [name])
    with pytest.raises(TrainingError, match="no calibration inputs"):
        onnx_scores("wanda", groups.graph.program, groups, [name])
    coded = node_groups(trace_onnx(genai_decoder(4)))
    ffn = [group.name for group in coded.prunable() if group.kind == "ffn"]
    with pytest.raises(TrainingError, match="codes' holds codes of type uint8"):
        onnx_scores("magnitude", coded.graph.program, coded, ffn)
    with pytest.raises(TrainingError, match=r"can be observed|holds codes"):
        onnx_scores("wanda", coded.graph.program, coded, ffn, [{}])
