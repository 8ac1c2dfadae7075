"""One shot on ONNX graphs: the share asked for goes, what is redundant goes first, and repair makes up for it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_models import GraphBuilder, genai_decoder
from onnx_networks import NETWORKS
from onnx_reference import assert_as_zeroed, example_inputs, in_memory, run

from graphprune.coupling.groups import node_groups
from graphprune.errors import BudgetError, TrainingError
from graphprune.prune.onnx import prune_onnx, repaired
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.trace.onnx import trace_onnx


def decoder_batches(count: int):
    generator = np.random.default_rng(0)
    caches = {
        f"past.{i}.{part}": np.zeros((2, 2, 0, 16), np.float32) for i in (0, 1) for part in ("key", "value")
    }
    return [
        {"ids": generator.integers(0, 61, (2, 9)), "mask": np.ones((2, 9), np.int64), **caches}
        for _ in range(count)
    ]


def parameters(model: ir.Model, groups) -> int:
    names = {name for name, value in groups.graph.weights.items() if value.role == "parameter"}
    return sum(value.const_value.size for name, value in model.graph.initializers.items() if name in names)


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "flap"])
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_the_share_that_was_asked_for_goes(saliency, layout):
    groups = node_groups(trace_onnx(genai_decoder()))
    pruned = prune_onnx(
        None,
        groups,
        decoder_batches(3),
        remove=0.2,
        saliency=saliency,
        layout=layout,
        repair=saliency != "magnitude",
    )
    before, after = parameters(groups.graph.program, groups), parameters(pruned.model, groups)
    assert after == pruned.budget.after
    assert before == pruned.budget.before
    assert abs(1 - after / before - 0.2) < 0.05
    if saliency == "magnitude":
        whole, small = decoder_batches(1)[0], dict(decoder_batches(1)[0])
        for value in pruned.model.graph.inputs:
            if len(value.shape) == 4:
                small[value.name] = np.zeros((2, value.shape[1], 0, 16), np.float32)
        output = [groups.graph.outputs[0].name]
        assert (
            run(in_memory(pruned.model), small, output)[0].shape
            == run(in_memory(groups.graph.program), whole, output)[0].shape
        )


def redundant(kind: str):
    """A layer of which the last two units are mixtures of the others, behind a linear map or a convolution."""
    build = GraphBuilder(18)
    mixture = np.random.default_rng(3).standard_normal((2, 6)).astype(np.float32)
    if kind == "linear":
        own = np.random.default_rng(4).standard_normal((5, 6)).astype(np.float32)
        wide = build.node("MatMul", "x", build.constant("up", np.concatenate([own, own @ mixture.T], 1)))
        result = build.node("MatMul", wide, build.weight("down", 8, 4))
        return build.model({"x": ("FLOAT", ("batch", 5))}, [result]), (64, 5)
    own = np.random.default_rng(4).standard_normal((6, 3, 1, 1)).astype(np.float32)
    mixed = np.einsum("ou,ucij->ocij", mixture, own)
    wide = build.node("Conv", "x", build.constant("up", np.concatenate([own, mixed])))
    result = build.node("Conv", wide, build.weight("down", 4, 8, 3, 3), pads=[1, 1, 1, 1])
    return build.model({"x": ("FLOAT", ("batch", 3, 6, 6))}, [result]), (8, 3, 6, 6)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_what_others_can_do_is_made_up_for(kind):
    model, shape = redundant(kind)
    groups = node_groups(trace_onnx(model))
    (group,) = [group for group in groups.prunable() if group.size == 8]
    batches = [
        {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)} for seed in range(4)
    ]
    plan, output = Plan({group.name: [6, 7]}), [groups.graph.outputs[0].name]
    fresh = {"x": np.random.default_rng(9).standard_normal(shape).astype(np.float32)}
    expected = run(in_memory(model), fresh, output)[0]
    errors = [
        np.abs(run(in_memory(shrink(whole, groups, plan)), fresh, output)[0] - expected).max()
        / np.abs(expected).max()
        for whole in (model, repaired(model, groups, plan, batches))
    ]
    assert errors[0] > 0.1
    assert errors[1] < 2e-3


def test_repair_does_nothing_where_nothing_goes_and_leaves_the_model_alone():
    model, shape = redundant("linear")
    groups = node_groups(trace_onnx(model))
    before = ir.to_proto(model).SerializeToString()
    batches = [{"x": np.ones(shape, np.float32)}] * 2
    (group,) = [group for group in groups.prunable() if group.size == 8]
    same = repaired(model, groups, Plan({}), batches)
    assert ir.to_proto(same).graph.initializer == ir.to_proto(model).graph.initializer
    repaired(model, groups, Plan({group.name: [1]}), batches)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_convolutional_net_is_pruned_by_its_channels():
    groups = node_groups(trace_onnx(NETWORKS["convolutions"]()))
    kinds = {group.kind for group in groups.prunable()}
    pruned = prune_onnx(
        None,
        groups,
        [example_inputs(groups.graph)],
        remove=0.2,
        saliency="magnitude",
        kinds=kinds,
        repair=False,
    )
    assert parameters(pruned.model, groups) == pruned.budget.after
    assert_as_zeroed(groups, pruned.model, pruned.plan)


def test_too_much_and_too_little_are_refused():
    groups = node_groups(trace_onnx(genai_decoder()))
    with pytest.raises(BudgetError, match="cannot be removed"):
        prune_onnx(None, groups, remove=0.99, saliency="magnitude", repair=False)
    with pytest.raises(TrainingError, match="1 batches in all"):
        prune_onnx(None, groups, decoder_batches(1), remove=0.2)
