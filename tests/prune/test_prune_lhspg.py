from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama, traced
from torch import nn

from graphprune.errors import TrainingError
from graphprune.prune.lhspg import LHSPG
from graphprune.prune.precision import frozen_in_bfloat16, use_bfloat16
from graphprune.prune.training import Objective, logits_of, train
from graphprune.recipe import Training
from graphprune.saliency.gates import Gates
from graphprune.source.adapters import attach_adapters

IDS = torch.arange(48).reshape(4, 12) % 60 + 3


class Bench:
    """A tiny Llama with adapters, gates on its channels, and LHSPG."""

    def __init__(self, **options) -> None:
        self.traced = traced(attach_adapters(tiny_llama(seed=5), rank=2, alpha=4))
        self.model, self.names = self.traced.model, self.traced.of_kind("ffn")
        self.gates = Gates(self.model, self.traced.groups, self.names)
        self.adapters = [p for p in self.model.parameters() if p.requires_grad]
        settings = {"lr": 1e-2, "warmup_steps": 2, "periods": 2, "period_steps": 3, **options}
        units = settings.pop("units", 8)
        self.optimizer = LHSPG(self.adapters, self.gates, dict.fromkeys(self.names, units), **settings)
        self.loss = Objective(logits_of(self.model), None, 0.0, False)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss(IDS).backward()
            self.optimizer.step()


@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 3))
def test_the_target_is_met_exactly_and_the_rest_is_untouched(units, periods, period_steps):
    gates = LooseGates(24)
    optimizer = LHSPG(
        [adapter()], gates, {"g": units}, warmup_steps=1, periods=periods, period_steps=period_steps
    )
    generator = torch.Generator().manual_seed(units)
    for _ in range(optimizer.schedule_steps):
        gates.values["g"].grad = torch.randn(24, generator=generator)
        optimizer.step()
    value = gates.values["g"].detach()
    assert int((value == 0).sum()) == units
    assert int((value == 1).sum()) == 24 - units


def adapter() -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    return parameter


class LooseGates:
    """Gates that hang on no model, to drive the schedule alone."""

    def __init__(self, size: int) -> None:
        self.values = {"g": nn.Parameter(torch.ones(size))}
        self.groups = {"g": type("Group", (), {"size": size})()}

    def gradients(self):
        gradient, self.values["g"].grad = self.values["g"].grad, None
        return {"g": gradient}


def path_of_one_unit(half_space: float, steps: int) -> list[float]:
    gates = LooseGates(2)
    optimizer = LHSPG(
        [adapter()], gates, {"g": 1}, warmup_steps=0, periods=1, period_steps=steps, half_space=half_space
    )
    path = []
    for _ in range(steps):
        gates.values["g"].grad = torch.tensor([0.0, 1.0])
        optimizer.step()
        path.append(float(gates.values["g"][0].detach()))
    return path


def test_gates_fade_by_a_straight_line_to_exactly_zero():
    assert path_of_one_unit(0.0, 5) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-6)
    assert path_of_one_unit(0.0, 5)[-1] == 0.0


@pytest.mark.parametrize("half_space", [0.5, 0.75, 0.9])
def test_the_half_space_projects_when_less_than_its_reciprocal_is_left(half_space):
    """⟨x̃, x⟩ ≤ ε‖x‖² with x̃ = x (1 − 1/left) fires as soon as left ≤ 1 / (1 − ε)."""
    steps = 20
    path = path_of_one_unit(half_space, steps)
    left_at_projection = steps - next(i for i, value in enumerate(path) if value == 0.0)
    assert left_at_projection == int(1 / (1 - half_space) + 1e-6)
    assert all(value == 0.0 for value in path[steps - left_at_projection :])


def test_the_least_salient_units_go_and_only_the_gradient_decides():
    gates = LooseGates(6)
    optimizer = LHSPG([adapter()], gates, {"g": 3}, warmup_steps=1, periods=1, period_steps=2)
    for _ in range(3):
        gates.values["g"].grad = torch.tensor([3.0, 0.1, -2.0, 0.2, -0.3, 5.0])
        optimizer.step()
    assert torch.nonzero(gates.values["g"] == 0).flatten().tolist() == [1, 3, 4]


def test_scores_given_decide_before_any_gradient_does():
    gates = LooseGates(4)
    scores = {"g": torch.tensor([9.0, 1.0, 9.0, 1.0])}
    optimizer = LHSPG([adapter()], gates, {"g": 2}, warmup_steps=0, periods=1, period_steps=1, scores=scores)
    gates.values["g"].grad = torch.zeros(4)
    optimizer.step()
    assert gates.values["g"].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_the_base_stays_as_it_is_bit_by_bit_and_adapters_learn():
    bench = Bench()
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    bench.steps(8)
    for name, parameter in bench.model.named_parameters():
        assert torch.equal(before[name], parameter) != ("lora_" in name), name
    assert bench.optimizer.counts == {"redundant": 16, "zeroed": 16, "target": 16}


def test_stopping_in_the_middle_of_a_period_changes_nothing():
    whole = Bench()
    whole.steps(9)
    first = Bench()
    first.steps(4)
    second = Bench()
    second.model.load_state_dict(first.model.state_dict())
    with torch.no_grad():
        for name in second.names:
            second.gates.values[name].copy_(first.gates.values[name])
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.steps(5)
    assert second.gates.redundant() == whole.gates.redundant()
    for ours, theirs in zip(second.adapters, whole.adapters):
        assert torch.equal(ours, theirs)


def test_nothing_to_remove_is_plain_adamw():
    bench, plain = Bench(units=0), Bench(units=0)
    adamw = torch.optim.AdamW(plain.adapters, lr=1e-2, weight_decay=0.0)
    bench.steps(6)
    for _ in range(6):
        adamw.zero_grad()
        plain.loss(IDS).backward()
        adamw.step()
    for ours, theirs in zip(bench.adapters, plain.adapters):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


def test_more_units_than_there_are_is_refused():
    with pytest.raises(TrainingError, match="cannot lose 48"):
        Bench(units=48)


def test_training_stops_at_the_first_loss_that_is_not_finite():
    bench = Bench()
    with torch.no_grad():
        bench.adapters[-1].fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss became nan at step 0"):
        train(iter([IDS]), bench.loss, bench.optimizer, steps=1, warmup=1, trainable=bench.adapters)


def test_the_learning_rate_warms_up_and_ends_at_a_tenth():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rows = train(
        iter([IDS] * 50),
        lambda ids: (parameter**2).sum(),
        optimizer,
        steps=50,
        warmup=4,
        trainable=[parameter],
    )
    rates = [row["learning_rate"] for row in rows]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=2e-3)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_distillation_is_the_divergence_from_the_teacher():
    """Against the definition, Σ p log(p / q), in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    plain = Objective(lambda _: student, None, 1.0, False)(ids)
    total = Objective(lambda _: student, lambda _: teacher, 0.7, False)(ids)
    p, q = (t[:, :-1].double().softmax(-1) for t in (teacher, student))
    divergence = (p * (p / q).log()).sum(-1).mean()
    assert float(total - plain) == pytest.approx(0.7 * float(divergence), rel=1e-5)


def test_the_precision_follows_the_models_device_not_what_else_the_machine_has(monkeypatch):
    """A model on the CPU of a machine with a GPU trains as on any CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    bench = Bench()
    assert not use_bfloat16(Training(), bench.model)
    assert use_bfloat16(Training(precision="bfloat16"), bench.model)
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    with frozen_in_bfloat16(bench.model):
        loss = Objective(logits_of(bench.model), None, 0.0, True)(IDS)
        loss.backward()
    assert all(torch.equal(before[name], p) for name, p in bench.model.named_parameters())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in bench.adapters)
    with torch.no_grad():
        assert float(loss) == pytest.approx(float(bench.loss(IDS)), rel=2e-2)
