"""LLM Surgeon's score, against weights refitted from scratch in numpy, and against all activations kept."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import BATCHES, IDS, score
from tiny_models import FFN
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import TrainingError
from graphprune.prune.training import Objective, logits_of
from graphprune.saliency import surgeon
from graphprune.saliency.curvature import Curvature, curvatures
from graphprune.saliency.effective import EffectiveWeight
from graphprune.saliency.gates import Gates
from graphprune.saliency.registry import Evidence, saliency_named

FACTORS = 3, 4
"""Inputs, outputs."""


def drawn(random, indices):
    """Return a weight, a second moment of what it reads and one of the gradients of what it puts out."""
    inputs, outputs = (random.normal(size=(size, size + 2)) for size in (indices, FACTORS[1]))
    return random.normal(size=(FACTORS[1], indices)), inputs @ inputs.T, outputs @ outputs.T


def read_of(owner, *factors):
    weight, moment, curvature = map(torch.from_numpy, factors)
    model = nn.ParameterDict({"weight": nn.Parameter(weight)})
    matrix = EffectiveWeight(model, "weight", 1, tuple(weight.shape))
    return surgeon._Read.of(Curvature(matrix, (), moment, curvature), torch.from_numpy(owner))


def least_cost(parts, gone):
    """Return the least tr(G D H Dᵀ) over all D that zero the columns of units, by weights solved for one by one."""
    total = 0.0
    for owner, weight, moment, curvature in parts:
        kept = ~np.isin(owner, list(gone))
        root, outer = np.linalg.cholesky(moment), np.linalg.cholesky(curvature)
        # min over W' of ‖Cᵀ (W − W') L‖², with W' zero where units are gone.
        refitted = np.linalg.lstsq(root[kept].T, (weight @ root).T, rcond=None)[0].T
        total += float(np.square(outer.T @ (weight @ root - refitted @ root[kept])).sum())
    return total


def by_brute_force(parts, units):
    """Return the scores of units that go one by one, each the cheapest by what its going adds."""
    scores, gone, level = np.zeros(units), [], 0.0
    while len(gone) < units:
        before = least_cost(parts, gone)
        added = {unit: least_cost(parts, [*gone, unit]) - before for unit in range(units) if unit not in gone}
        unit = min(added, key=added.get)
        level = scores[unit] = max(level, added[unit])
        gone.append(unit)
    return scores, gone


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 2), st.booleans())
@settings(max_examples=30, deadline=None)
def test_units_score_what_their_going_adds_after_a_refit(seed, each, weights, others):
    units, random, parts, reads = 5, np.random.default_rng(seed), [], []
    for _ in range(weights):
        owner = np.repeat(np.arange(units), each)
        owner = random.permutation(np.concatenate([owner, [-1, -1]]) if others else owner)
        weight, moment, curvature = drawn(random, len(owner))
        ridge = surgeon.RIDGE * np.diag(moment).mean() * np.eye(len(owner))
        parts.append((owner, weight, moment + ridge, curvature))
        reads.append(read_of(owner, weight, moment, curvature))
    expected, order = by_brute_force(parts, units)
    scores = surgeon._eliminated(reads, units)
    assert scores.argsort().tolist() == order
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_in_rounds_units_go_by_what_they_cost_alone(monkeypatch):
    monkeypatch.setattr(surgeon, "ROUNDS", 2)
    weight, moment, curvature = drawn(np.random.default_rng(0), 6)
    ridge = surgeon.RIDGE * np.diag(moment).mean() * np.eye(6)
    parts = [(np.arange(6), weight, moment + ridge, curvature)]
    scores = surgeon._eliminated([read_of(np.arange(6), weight, moment, curvature)], 6)
    alone = np.array([least_cost(parts, [unit]) for unit in range(6)])
    first = np.argsort(alone)[:3]
    assert scores.argsort()[:3].tolist() == first.tolist()
    np.testing.assert_allclose(scores[first], alone[first], rtol=1e-4)
    before = least_cost(parts, first)
    after = {unit: least_cost(parts, [*first, unit]) - before for unit in set(range(6)) - set(first)}
    assert scores.argsort()[3:].tolist() == sorted(after, key=after.get)


def evidence_of(traced, kind):
    gates = Gates(traced.model, traced.groups, traced.of_kind(kind))
    loss = Objective(logits_of(traced.model), None, 0.0, False)
    return Evidence(traced.model, traced.groups, gates, BATCHES, loss)


@pytest.mark.parametrize(
    ("kind", "path"), [("ffn", "mlp.down_proj"), ("attention_heads", "self_attn.o_proj")]
)
def test_both_moments_are_those_of_all_activations(adapted, kind, path):
    evidence = evidence_of(adapted, kind)
    found = curvatures(evidence)
    evidence.gates.close()
    linears = [layer.get_submodule(path) for layer in adapted.model.base_model.model.model.layers]
    kept = [Kept(linear.base_layer) for linear in linears]
    loss = Objective(logits_of(adapted.model), None, 0.0, False)
    for batch in BATCHES:
        value = loss(batch)
        gradients = torch.autograd.grad(value, [each.outputs[-1] for each in kept])
        for each, gradient in zip(kept, gradients, strict=True):
            each.gradients.append(gradient)
    for curvature, each, linear in zip(found, kept, linears, strict=True):
        each.handle.remove()
        x, g = (torch.cat(parts).flatten(0, -2).double() for parts in (each.inputs, each.gradients))
        assert len(x) == IDS.numel()
        torch.testing.assert_close(curvature.inputs.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        expected = g.T @ g / len(g)
        least = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(curvature.outputs.double(), expected, rtol=1e-4, atol=least)
        effective = linear.base_layer.weight + linear.get_delta_weight("default")
        torch.testing.assert_close(curvature.weight, effective.detach())


class Kept:
    """What a module has read and put out."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs, self.outputs, self.gradients = [], [], []
        self.handle = module.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep one call's."""
        self.inputs.append(arguments[0].detach())
        self.outputs.append(output)


def test_of_two_units_that_say_the_same_one_is_cheap_and_the_other_dear(llama):
    """The one that stays takes over all that the other did, so that its column is twice as long."""
    model = copy.deepcopy(llama.model)
    mlp = model.model.layers[0].mlp
    name = llama.of_kind("ffn")[0]
    before = score(llama, "surgeon", kinds=("ffn",))[name]
    first, second = before.argsort()[[FFN // 2, 3 * FFN // 4]].tolist()
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[second] = linear.weight[first]
        mlp.down_proj.weight[:, second] = mlp.down_proj.weight[:, first]
    after = score(llama, "surgeon", model=model, kinds=("ffn",))[name]
    cheap, dear = sorted(after[[first, second]].tolist())
    assert cheap < 0.5 * float(before[first])
    assert dear > 2 * float(before[first])


def test_a_batch_s_outputs_are_let_go_of_before_the_next(adapted, monkeypatch):
    counts, gradients_of = [], torch.autograd.grad

    def counted(loss, outputs, **options):
        counts.append(len(outputs))
        return gradients_of(loss, outputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    score(adapted, "surgeon")
    assert counts == [4] * len(BATCHES)


class Pictures(nn.Module):
    """Two convolutions; the second reads the channels of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_convolutions_are_refused_by_name():
    torch.manual_seed(0)
    model, x = Pictures(), torch.randn(2, 3, 8, 8)
    groups = gp.node_groups(gp.trace(model, (x,)))
    gates = Gates(model, groups, [group.name for group in groups.prunable() if group.size == 6])
    evidence = Evidence(model, groups, gates, [x], lambda batch: model(batch).square().mean())
    with pytest.raises(TrainingError, match=r"'second', which reads units by second\.weight, is no linear"):
        saliency_named("surgeon")(evidence)
    assert float(saliency_named("wanda")(evidence)[next(iter(gates.values))].min()) > 0


class Halved(nn.Linear):
    """Puts its outputs out as two rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (2, -1))


def test_layers_that_put_out_something_else_are_refused_by_name():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Halved(6, 4)), torch.randn(7, 5)
    groups = gp.node_groups(gp.trace(model, (x,)))
    gates = Gates(model, groups, [group.name for group in groups.prunable() if group.size == 6])
    evidence = Evidence(model, groups, gates, [x], lambda batch: model(batch).square().mean())
    with pytest.raises(TrainingError, match=r"'2', which reads units by 2\.weight, is no linear layer"):
        saliency_named("surgeon")(evidence)
