"""Paper mode against algorithm 4 and equation 2 written out in numpy, unit by unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lhspg_bench import IDS, INPUTS, Bench, Net, adapted_net, adapted_net_groups, width_of
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import tiny_llama
from torch import nn

import graphprune as gp
from graphprune.errors import TrainingError
from graphprune.prune import low_rank, unit_rows
from graphprune.prune.low_rank import AdaptedWeight, adapted_weights
from graphprune.prune.paper_mode import PaperMode
from graphprune.source.model import example_inputs


def randomized(bench: Bench, size: float = 0.3) -> Bench:
    """Give every B values, as after a warm-up."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for update in adapted_weights(bench.model, bench.groups.graph):
            update.b.copy_(torch.randn(update.b.shape, generator=generator) * size)
    return bench


def dense_updates(model: nn.Module) -> dict[int, np.ndarray]:
    """Return s BA of every adapted weight by its id, as PEFT computes it."""
    return {
        id(module.get_base_layer().weight): module.get_delta_weight("default").detach().double().numpy()
        for module in model.modules()
        if isinstance(module, LoraLayer)
    }


def numbers(bench: Bench, name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return x and s BA of each unit of a group, flat."""
    deltas = dense_updates(bench.model)
    group = bench.groups[name]
    x: list[list[np.ndarray]] = [[] for _ in range(group.size)]
    update: list[list[np.ndarray]] = [[] for _ in range(group.size)]
    for member in group.members:
        weight = bench.model.get_parameter(member.parameter)
        if member.side == "produces" and not weight.requires_grad:
            for unit in range(group.size):
                rows = group.indices(member, unit)
                x[unit].append(weight.detach().double().numpy().take(rows, member.axis).ravel())
                update[unit].append(deltas[id(weight)].take(rows, member.axis).ravel())
    return [np.concatenate(parts) for parts in x], [np.concatenate(parts) for parts in update]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize(
    ("half_space", "left", "projects"),
    [
        (0.0, 4, {False}),
        (0.5, 4, {False}),
        (0.73, 4, {False, True}),
        (0.45, 2, {False, True}),
        (0.3, 1, {True}),
    ],
)
@pytest.mark.parametrize("rows_at_a_time", [5, 1024])
def test_a_half_space_step_is_equation_2(monkeypatch, gamma, half_space, left, projects, rows_at_a_time):
    monkeypatch.setattr(unit_rows, "ROWS", rows_at_a_time)
    bench = randomized(Bench(mode="paper", paper=gp.PaperChoices(gamma=gamma)))
    mode = bench.optimizer._fading
    redundant = {name: torch.arange(bench.groups[name].size) % 2 == 0 for name in bench.units}
    before = {name: numbers(bench, name) for name in redundant}
    mode.fade(redundant, left, half_space)
    outcomes = set()
    for name, mask in redundant.items():
        after, deltas = numbers(bench, name)
        for unit, (x, ba) in enumerate(zip(*before[name])):
            expected, projected = x, False
            if mask[unit]:
                penalty = np.linalg.norm(x) / left
                trial = x + gamma * ba - penalty * x / np.linalg.norm(x)
                projected = trial @ x <= half_space * (x @ x) or left == 1
                expected = np.zeros_like(x) if projected else trial
                outcomes.add(bool(projected))
                assert not deltas[unit].any()
            else:
                assert np.array_equal(deltas[unit], ba)
            assert np.allclose(after[unit], expected, atol=1e-6), (name, unit)
            assert bool(mode.zeroed()[name][unit]) == projected
    assert outcomes == projects


def test_the_penalty_is_a_choice():
    """A constant share of the norm decays geometrically, and the period's last step still leaves zeros."""
    choices = gp.PaperChoices(penalty=lambda norm, left: 0.1 * norm)
    bench = Bench(mode="paper", paper=choices)
    name = next(iter(bench.units))
    x, _ = numbers(bench, name)
    everything = {name: torch.ones(bench.groups[name].size, dtype=torch.bool) for name in bench.units}
    for left in (3, 2):
        bench.optimizer._fading.fade(everything, left, 0.0)
    assert np.allclose(numbers(bench, name)[0][0], 0.81 * x[0], atol=1e-6)
    bench.optimizer._fading.fade(everything, 1, 0.0)
    assert not numbers(bench, name)[0][0].any()


def test_without_adapters_help_units_fade_by_a_straight_line():
    """With B at zero, x is (Tp - t - 1) / Tp of what it was after step t."""
    bench = Bench(mode="paper", lr=1e-30, warmup_steps=0, periods=1, period_steps=4)
    name = next(iter(bench.units))
    x, _ = numbers(bench, name)
    for share in (0.75, 0.5, 0.25, 0.0):
        bench.steps(1)
        now, _ = numbers(bench, name)
        for unit, mask in enumerate(bench.optimizer.redundant(name)):
            assert np.allclose(now[unit], x[unit] * (share if mask else 1), atol=1e-6)


def test_important_units_are_never_projected_or_faded():
    """With nearly no learning, all that changes in the base is the rows of the units that go."""
    bench = Bench(mode="paper", lr=1e-12)
    before = {name: numbers(bench, name)[0] for name in bench.units}
    untouched = {
        name: p.detach().clone() for name, p in bench.model.named_parameters() if not p.requires_grad
    }
    bench.steps(8)
    plan = bench.optimizer.plan
    for name, count in bench.units.items():
        assert len(plan[name]) == count
        for unit, (x, first) in enumerate(zip(numbers(bench, name)[0], before[name])):
            assert not x.any() if unit in plan[name] else np.allclose(x, first, atol=1e-9)
    written = {id(weight) for name in bench.units for weight, _, _ in bench.produced(name)}
    for name, first in untouched.items():
        parameter = bench.model.get_parameter(name)
        assert id(parameter) in written or torch.allclose(parameter, first, atol=1e-9), name


def test_learning_moves_into_the_base_once_a_period():
    bench = Bench(mode="paper", warmup_steps=1, periods=2, period_steps=2)
    updates = adapted_weights(bench.model, bench.groups.graph)
    for step in range(5):
        bench.steps(1)
        merged = step in (2, 4)
        assert all(bool((update.b == 0).all()) == merged for update in updates), step
        assert all((update.b in bench.optimizer.state) != merged for update in updates), step
        assert all(update.a in bench.optimizer.state for update in updates)


def test_moments_may_be_kept():
    bench = Bench(
        mode="paper", paper=gp.PaperChoices(forget=False), warmup_steps=0, periods=1, period_steps=1
    )
    bench.steps(1)
    assert all(
        update.b in bench.optimizer.state for update in adapted_weights(bench.model, bench.groups.graph)
    )


@pytest.mark.parametrize("rows_at_a_time", [5, 1024])
def test_a_merge_leaves_the_function_alone(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(low_rank, "ROWS", rows_at_a_time)
    bench = randomized(Bench(mode="paper"))
    with torch.no_grad():
        before = bench.model(IDS).logits
        with bench.model.disable_adapter():
            assert not torch.allclose(bench.model(IDS).logits, before, atol=1e-2)
        bench.optimizer._fading.end_period()
        torch.testing.assert_close(bench.model(IDS).logits, before, atol=1e-4, rtol=0)
        with bench.model.disable_adapter():
            torch.testing.assert_close(bench.model(IDS).logits, before, atol=1e-4, rtol=0)


def test_a_transposed_weight_gets_the_transposed_update():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (2, 3), (5, 2))
    )
    expected = weight + 0.5 * (b @ a).T
    AdaptedWeight("layer", weight, True, a, b, 0.5).merge()
    torch.testing.assert_close(weight, expected)


def test_what_is_zero_can_be_cut_out():
    bench = Bench(mode="paper")
    bench.steps(10)
    small = gp.shrink(bench.model, bench.groups, bench.optimizer.plan)
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, bench.model(IDS).logits, atol=1e-5, rtol=0)


def test_what_is_gone_stays_so_through_a_merge():
    """The optimizer moves B of zeroed units wherever gradients reach them, as behind GELU and in v_proj."""
    bench = Bench(mode="paper")
    mode = bench.optimizer._fading
    gone = {name: torch.arange(bench.groups[name].size) == 0 for name in bench.units}
    mode.fade(gone, 1, 0.0)
    randomized(bench)
    mode.fade(gone, 3, 0.0)
    mode.end_period()
    for name in bench.units:
        x, _ = numbers(bench, name)
        assert not x[0].any(), name
        assert x[1].any(), name


def test_fading_moves_what_lora_learned_into_the_redundant_weights():
    """At γ = 1 and without a penalty the model computes the same after a step of fading."""
    bench = randomized(Bench(mode="paper", paper=gp.PaperChoices(penalty=lambda norm, left: 0 * norm)), 0.02)
    everything = {name: torch.ones(bench.groups[name].size, dtype=torch.bool) for name in bench.units}
    with torch.no_grad():
        before = bench.model(IDS).logits
        bench.optimizer._fading.fade(everything, 2, 0.0)
        torch.testing.assert_close(bench.model(IDS).logits, before, atol=1e-4, rtol=0)
    assert not any(bool(mask.any()) for mask in bench.optimizer._fading.zeroed().values())


def scored(saliency: str) -> tuple[Bench, dict[str, torch.Tensor]]:
    bench = randomized(Bench(mode="paper", paper=gp.PaperChoices(saliency=saliency)))
    bench.loss(IDS).backward()
    with torch.no_grad():
        return bench, bench.optimizer._fading.observe()


def test_taylor_is_what_the_factors_say_of_the_dense_gradient():
    """With G = ∂f/∂W by autograd: s (∂B A + B ∂A) = s² (G AᵀA + BBᵀ G)."""
    bench, scores = scored("taylor")
    bench.optimizer.zero_grad()
    updates = adapted_weights(bench.model, bench.groups.graph)
    for update in updates:
        update.weight.requires_grad_(True)
    bench.loss(IDS).backward()
    surrogate = {}
    for update in updates:
        gradient, a, b = (t.detach().double() for t in (update.weight.grad, update.a, update.b))
        surrogate[id(update.weight)] = update.scale**2 * (gradient @ a.T @ a + b @ b.T @ gradient)
    for name in bench.units:
        expected = torch.zeros(bench.groups[name].size, dtype=torch.float64)
        for weight, axis, owner in bench.produced(name):
            if id(weight) in surrogate:
                per_row = (weight.detach().double() * surrogate[id(weight)]).sum(1 - axis)
                expected.index_add_(0, torch.from_numpy(owner), per_row)
        torch.testing.assert_close(scores[name].double(), expected.abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("saliency", "formula"),
    [
        ("magnitude", lambda x, ba: np.linalg.norm(x)),
        ("cosine", lambda x, ba: 1 + x @ ba / np.linalg.norm(x) / np.linalg.norm(ba)),
    ],
)
def test_other_saliencies_are_their_formulas(saliency, formula):
    bench, scores = scored(saliency)
    for name in bench.units:
        expected = [formula(x, ba) for x, ba in zip(*numbers(bench, name))]
        assert np.allclose(scores[name].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_what_trains_beside_the_adapters_is_held_at_zero_too():
    """A bias in front of a non-linearity belongs to the unit, trains, and must not come back."""
    model, groups = adapted_net(), adapted_net_groups()
    name = width_of(groups)
    params = gp.param_groups(model, groups, kinds=["ffn"])
    optimizer = gp.LHSPG(
        params,
        units={name: 5},
        mode="paper",
        lr=0.1,
        warmup_steps=1,
        periods=1,
        period_steps=2,
        weight_decay=0.1,
    )
    for _ in range(6):
        optimizer.zero_grad()
        (model(**INPUTS) - 1).square().sum().backward()
        optimizer.step()
    units = list(optimizer.plan[name])
    layer = model.base_model.model.up
    for tensor in (layer.base_layer.bias, layer.base_layer.weight, layer.lora_B["default"].weight):
        assert not tensor.detach()[units].any()
    assert layer.base_layer.bias.detach().any()


def traced_peft_net(*further: str, **options: object) -> gp.LHSPG:
    """LHSPG in paper mode on the net with adapters of some kind, traced as they are."""
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["up", "down"], **options))
    for name in further:
        model.add_adapter(name, LoraConfig(r=2, target_modules=["up", "down"]))
    model.base_model.set_adapter(["default", *further])
    groups = gp.node_groups(gp.trace(model, INPUTS))
    params = gp.param_groups(model, groups, kinds=["ffn"])
    return gp.LHSPG(params, units={width_of(groups): 2}, mode="paper")


def test_what_trains_but_is_not_plain_lora_is_refused_by_name():
    with pytest.raises(TrainingError, match=r"lora_B.default.weight trains, and is no factor"):
        traced_peft_net(use_dora=True)
    with pytest.raises(TrainingError, match=r"up.base_layer.weight: several adapters update it"):
        traced_peft_net("other")


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "bias": "none"}, {"use_rslora": True}])
def test_a_bias_of_b_and_another_scale_are_plain_enough(options):
    assert traced_peft_net(**options).steps_left > 0


class ByHand(Net):
    """A low-rank update without PEFT, of a weight (outputs, inputs) or (inputs, outputs)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 24) if transposed else torch.randn(24, 6))
        self.requires_grad_(False)
        self.first, self.second = nn.Linear(6, 2, bias=False), nn.Linear(2, 24, bias=False)
        self.transposed = transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = x @ self.matrix if self.transposed else nn.functional.linear(x, self.matrix)
        return self.down(torch.relu(up + 0.5 * self.second(self.first(x))))


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_are_found_whatever_attached_them(transposed):
    model = ByHand(transposed)
    groups = gp.node_groups(gp.trace(model, INPUTS))
    (update,) = adapted_weights(model, groups.graph)
    with torch.no_grad():
        expected = model(**INPUTS)
        update.merge()
        assert not model.second.weight.any()
        torch.testing.assert_close(model(**INPUTS), expected)


def test_a_quantized_base_is_refused():
    bench = Bench()
    layer = next(module for module in bench.model.modules() if isinstance(module, LoraLayer))
    layer.get_base_layer().weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TrainingError, match="it is quantized"):
        adapted_weights(bench.model, bench.groups.graph)


def test_units_that_no_adapter_reaches_need_another_saliency():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    groups = gp.node_groups(gp.trace(model, example_inputs(model)))
    params = gp.param_groups(model, groups)
    (first, *_) = (group.name for group in params.prunable if group.kind == "ffn")
    with pytest.raises(TrainingError, match="LoRA says nothing of them"):
        gp.LHSPG(params, units={first: 2}, mode="paper")
    choices = gp.PaperChoices(saliency="magnitude")
    optimizer = gp.LHSPG(
        params, units={first: 2}, mode="paper", paper=choices, warmup_steps=0, periods=1, period_steps=1
    )
    assert isinstance(optimizer._fading, PaperMode)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert len(optimizer.plan[first]) == 2


def test_a_saliency_that_does_not_exist_is_refused():
    with pytest.raises(TrainingError, match=r"no saliency 'taylr'\n.*taylor, magnitude, cosine"):
        gp.PaperChoices(saliency="taylr")


def test_paper_mode_has_no_gates():
    with pytest.raises(TrainingError, match="has no gates"):
        _ = Bench(mode="paper").optimizer.gates
