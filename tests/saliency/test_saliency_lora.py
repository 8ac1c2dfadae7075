"""Saliencies from the gradients of adapters, against dense formulas in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scoring import IDS, score
from tiny_models import FFN, HEADS, KV_HEADS, LAYERS, tiny_llama, traced
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune.errors import TrainingError
from graphprune.prune.training import Objective, logits_of
from graphprune.saliency import effective
from graphprune.saliency.gates import Gates
from graphprune.saliency.loraprune import importance
from graphprune.saliency.registry import Evidence
from graphprune.saliency.units import adapted_members

SCALE = 40.0  # of the loss: large, so that products of two gradients are seen at the tests' tolerance
SCALING = 2.0  # of the adapters: alpha 8, rank 4
HEAD = 8
NAMES = (
    "taylor_first",
    "taylor_vector",
    "taylor_second",
    "taylor_mix",
    "loraprune",
    "loraprune_released",
    "cosine",
    "cosine_gradient",
)


class Dense:
    """One weight's numbers by autograd on the frozen weight itself: W, its update, the surrogates of its gradient."""

    def __init__(self, linear, gradients):
        self.frozen = linear.base_layer.weight.detach().double()
        down, up = (factor["default"].weight.detach().double() for factor in (linear.lora_A, linear.lora_B))
        self.product = up @ down
        self.weight = self.frozen + SCALING * self.product
        self.surrogates = [self._surrogate(g.double(), down, up) for g in gradients]
        self.of_mean = self._surrogate(torch.stack(gradients).double().mean(0), down, up)

    @staticmethod
    def _surrogate(gradient, down, up):
        of_up, of_down = SCALING * gradient @ down.T, SCALING * up.T @ gradient
        return of_up @ down + up @ of_down - of_up @ of_down


@pytest.fixture(scope="module")
def dense(adapted):
    """Every adapted linear of the tiny Llama, by (layer, name)."""
    model = copy.deepcopy(adapted.model)
    linears = {
        (index, name): getattr(part, name)
        for index, layer in enumerate(model.base_model.model.model.layers)
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down")))
        for name in (f"{short}_proj" for short in names)
    }
    weights = [linear.base_layer.weight.requires_grad_() for linear in linears.values()]
    loss = Objective(logits_of(model), None, 0.0, False)
    gradients = [torch.autograd.grad(SCALE * loss(ids), weights) for ids in IDS.split(1)]
    return {
        place: Dense(linear, by_batch)
        for (place, linear), by_batch in zip(linears.items(), zip(*gradients), strict=True)
    }


def slices(kind, layer, unit):
    """What a unit owns: the weight, the axis, and which indices."""
    if kind == "ffn":
        owned = slice(unit, unit + 1)
        return [
            ((layer, "gate_proj"), 0, owned),
            ((layer, "up_proj"), 0, owned),
            ((layer, "down_proj"), 1, owned),
        ]
    query = slice(unit * HEAD * HEADS // KV_HEADS, (unit + 1) * HEAD * HEADS // KV_HEADS)
    key = slice(unit * HEAD, (unit + 1) * HEAD)
    return [
        ((layer, "q_proj"), 0, query),
        ((layer, "k_proj"), 0, key),
        ((layer, "v_proj"), 0, key),
        ((layer, "o_proj"), 1, query),
    ]


def cut(matrix, axis, owned):
    """A unit's rows of a matrix, or its columns as rows."""
    return (matrix if axis == 0 else matrix.T)[owned]


ELEMENTS = {
    "taylor_first": lambda w: (w.weight * w.of_mean).abs(),
    "taylor_vector": lambda w: w.weight * w.of_mean,
    "taylor_second": lambda w: w.weight**2 * torch.stack([g**2 for g in w.surrogates]).mean(0),
    "taylor_mix": lambda w: (
        w.weight * w.of_mean - 0.5 * w.weight**2 * torch.stack([g**2 for g in w.surrogates]).mean(0)
    ).abs(),
    "loraprune": lambda w: torch.stack([(w.weight * g) ** 2 for g in w.surrogates]).mean(0),
}


def reference(name, dense, kind, layer):
    units = range(FFN if kind == "ffn" else KV_HEADS)
    if name.startswith("cosine"):
        return torch.stack([reference_cosine(name, dense, slices(kind, layer, u)) for u in units])
    if name == "loraprune_released":
        return sum(reference_released(dense, kind, layer, batch, units) for batch in range(len(IDS))) / len(
            IDS
        )
    return torch.stack(
        [
            sum(
                cut(ELEMENTS[name](dense[place]), axis, owned).sum(1).abs().sum()
                for place, axis, owned in slices(kind, layer, unit)
            )
            for unit in units
        ]
    )


def reference_cosine(name, dense, owned_slices):
    first, second = [], []
    for place, axis, owned in owned_slices:
        w = dense[place]
        pair = (w.frozen, w.product) if name == "cosine" else (w.weight, -w.of_mean)
        first.append(cut(pair[0], axis, owned).flatten())
        second.append(cut(pair[1], axis, owned).flatten())
    return torch.nn.functional.cosine_similarity(torch.cat(first), torch.cat(second), dim=0) + 1


def reference_released(dense, kind, layer, batch, units):
    total = 0
    for member in range(len(slices(kind, layer, 0))):
        values = []
        for unit in units:
            place, axis, owned = slices(kind, layer, unit)[member]
            w = dense[place]
            values.append(cut((w.weight * w.surrogates[batch]).abs(), axis, owned).sum())
        total = total + torch.stack(values) / (torch.stack(values).norm() + 1e-8)
    return total


@pytest.mark.parametrize("chunk", [100, 1 << 22])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_dense_formula(name, chunk, adapted, dense, monkeypatch):
    monkeypatch.setattr(effective, "CHUNK", chunk)
    scores = score(adapted, name, scale=SCALE)
    for kind in ("ffn", "attention_heads"):
        for layer, group in zip(range(LAYERS), adapted.of_kind(kind), strict=True):
            expected = reference(name, dense, kind, layer)
            torch.testing.assert_close(scores[group].double(), expected, rtol=1e-4, atol=1e-9)


def test_with_fresh_adapters_the_gradient_is_seen_through_a():
    """B = 0, so that Ĝ = scaling · G AᵀA; weights without an adapter take no part."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "down_proj"])
    own = traced(get_peft_model(tiny_llama(seed=2), config).eval())
    scores = score(own, "taylor_first", kinds=("ffn",))[own.of_kind("ffn")[1]]
    mlp = own.model.base_model.model.model.layers[1].mlp
    linears = (mlp.up_proj, mlp.down_proj)
    weights = [linear.base_layer.weight.requires_grad_() for linear in linears]
    loss = Objective(logits_of(own.model), None, 0.0, False)
    mean = sum(loss(ids) for ids in IDS.split(1)) / len(IDS)
    expected = 0
    for linear, gradient in zip(linears, torch.autograd.grad(mean, weights), strict=True):
        down = linear.lora_A["default"].weight.detach().double()
        surrogate = SCALING * gradient.double() @ down.T @ down
        product = (linear.base_layer.weight.detach() * surrogate).abs()
        expected = expected + product.sum(0 if linear is mlp.down_proj else 1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-10)


def test_untrained_adapters_have_no_direction(adapted):
    model = copy.deepcopy(adapted.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    with pytest.raises(TrainingError, match="move none of its weights"):
        score(adapted, "cosine", model=model)
    assert all(
        bool(value.isfinite().all()) for value in score(adapted, "cosine_gradient", model=model).values()
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_adapters_is_refused(name, llama):
    with pytest.raises(TrainingError, match=r"none of the weights of .* carries a low-rank adapter"):
        score(llama, name)


def test_a_frozen_adapter_is_refused(adapted):
    model = copy.deepcopy(adapted.model).requires_grad_(False)
    with pytest.raises(TrainingError, match="is frozen"):
        score(adapted, "taylor_first", model=model)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is computed, views of what was there before left out."""

    def __init__(self, model):
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("released", [False, True])
def test_no_gradient_of_a_whole_weight_is_ever_made(adapted, monkeypatch, released):
    monkeypatch.setattr(effective, "CHUNK", 128)
    gates = Gates(
        adapted.model, adapted.groups, [*adapted.of_kind("ffn"), *adapted.of_kind("attention_heads")]
    )
    evidence = Evidence(adapted.model, adapted.groups, gates, IDS.split(1), lambda ids: ids)
    members = adapted_members(evidence.model, evidence.groups, evidence.gates.groups)
    gates.close()
    factors = {name: torch.ones_like(f) for m in members for name, f in m.weight.factors().items()}
    with Largest(adapted.model) as seen:
        importance(members, factors, released=released)
    rank_by_width = 4 * FFN
    assert 0 < seen.size <= rank_by_width
    assert min(math.prod(member.weight.shape) for member in members) > rank_by_width
