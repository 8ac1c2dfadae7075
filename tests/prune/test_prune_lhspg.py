from __future__ import annotations

import copy
import multiprocessing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lhspg_bench import IDS, Bench, Driven, net_groups, width_of
from torch import nn

import graphprune as gp
from graphprune.errors import TrainingError

MODES = ["gated", "paper"]


@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 3))
def test_the_target_is_met_exactly_and_the_rest_is_untouched(units, periods, period_steps):
    driven = Driven(units, warmup_steps=1, periods=periods, period_steps=period_steps)
    generator = torch.Generator().manual_seed(units)
    for _ in range(driven.optimizer.schedule_steps):
        driven.step(torch.randn(24, generator=generator))
    assert len(driven.optimizer.plan.get(driven.name, ())) == units
    if units:
        assert int((driven.gate == 0).sum()) == units
        assert int((driven.gate == 1).sum()) == 24 - units


def path_of_one_unit(half_space: float, steps: int) -> list[float]:
    driven = Driven(1, warmup_steps=0, periods=1, period_steps=steps, half_space=half_space)
    path = []
    for _ in range(steps):
        driven.step(torch.arange(24.0))
        path.append(float(driven.gate[0].detach()))
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
    driven = Driven(3, warmup_steps=1, periods=1, period_steps=2)
    gradient = torch.full((24,), 9.0)
    gradient[:6] = torch.tensor([3.0, 0.1, -2.0, 0.2, -0.3, 5.0])
    for _ in range(3):
        driven.step(gradient.clone())
    assert driven.optimizer.plan[driven.name] == (1, 3, 4)


def test_each_period_takes_its_share_of_what_is_left_by_what_it_knows_then():
    driven = Driven(4, warmup_steps=0, periods=2, period_steps=1, memory=0.0)
    driven.step(torch.arange(24.0))
    assert torch.nonzero(driven.optimizer.redundant(driven.name)).flatten().tolist() == [0, 1]
    driven.step(torch.arange(24.0).flip(0))
    assert driven.optimizer.plan[driven.name] == (0, 1, 22, 23)


def test_scores_given_decide_before_any_gradient_does():
    scores = torch.full((24,), 9.0)
    scores[[1, 3]] = 1.0
    given = {width_of(net_groups()): scores}
    driven = Driven(2, warmup_steps=0, periods=1, period_steps=1, scores=given)
    driven.step(torch.zeros(24))
    assert driven.optimizer.plan[driven.name] == (1, 3)


def test_the_base_stays_as_it_is_bit_by_bit_and_adapters_learn():
    bench = Bench()
    before = bench.snapshot()
    bench.steps(8)
    for name, parameter in bench.model.named_parameters():
        assert torch.equal(before[name], parameter) != ("lora_" in name), name
    assert bench.optimizer.counts == {"redundant": 18, "zeroed": 18, "target": 18}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_stopping_anywhere_changes_nothing(mode, stop):
    """Only adapters and the optimizer's state are stored, as the Trainer does with a PEFT model."""
    whole = Bench(mode=mode)
    whole.steps(9)
    first = Bench(mode=mode)
    first.steps(stop)
    second = Bench(mode=mode, period_steps=99, memory=0.1)
    second.model.load_state_dict(
        {name: value for name, value in first.model.state_dict().items() if "lora_" in name}, strict=False
    )
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.steps(9 - stop)
    assert second.optimizer.plan == whole.optimizer.plan
    expected = whole.snapshot()
    for name, value in second.snapshot().items():
        assert torch.equal(value, expected[name]), name


def test_the_state_of_another_mode_or_target_is_refused():
    state = Bench().optimizer.state_dict()
    for other in (Bench(mode="paper"), Bench(ffn=4)):
        with pytest.raises(TrainingError, match="this is the state of mode 'gated'"):
            other.optimizer.load_state_dict(state)
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(TrainingError, match="the state of another optimizer"):
        Bench().optimizer.load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_remove_is_adamw_to_the_bit(mode):
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    bench, plain = Bench(mode=mode, units=None, remove=0.0, **options), Bench(ffn=0, heads=0)
    adamw = torch.optim.AdamW(plain.adapters, **options)
    bench.steps(9)
    for _ in range(9):
        adamw.zero_grad()
        plain.loss(IDS).backward()
        adamw.step()
    expected = plain.snapshot()
    for name, value in bench.snapshot().items():
        assert torch.equal(value, expected[name]), name
    assert not bench.optimizer.plan


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_a_learning_rate_of_zero_changes_nothing(mode, warmup_steps):
    bench = Bench(mode=mode, lr=0.0, weight_decay=0.1, warmup_steps=warmup_steps)
    before, schedule = bench.snapshot(), bench.optimizer.steps_left
    logits = bench.model(IDS).logits
    bench.steps(9)
    for name, value in bench.snapshot().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(bench.model(IDS).logits, logits)
    assert bench.optimizer.counts == {"redundant": 0, "zeroed": 0, "target": 18}
    assert bench.optimizer.steps_left == schedule


def test_steps_at_a_learning_rate_of_zero_do_not_count():
    bench = Bench()
    rates = torch.optim.lr_scheduler.LambdaLR(bench.optimizer, lambda step: min(1.0, step / 2))
    for left in (8, 7, 6):
        bench.steps(1)
        rates.step()
        assert bench.optimizer.steps_left == left
    bench.steps(6)
    assert {name: len(units) for name, units in bench.optimizer.plan.items()} == bench.units


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_zero_stays_zero_to_the_bit(mode, dtype):
    """Under momentum, weight decay, gradient accumulation and bfloat16, after every further step."""
    bench = Bench(dtype, mode=mode, weight_decay=0.1)
    bench.steps(bench.optimizer.schedule_steps, accumulate=2)
    plan = bench.optimizer.plan
    assert {name: len(units) for name, units in plan.items()} == bench.units
    for _ in range(3):
        bench.steps(1, accumulate=2)
        assert bench.optimizer.plan == plan
        for name, units in plan.items():
            for tensor in what_a_mode_zeroes(bench, mode, name, list(units)):
                bits = tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
                assert not bits.any(), name


def what_a_mode_zeroes(bench, mode, name, units):
    if mode == "gated":
        yield bench.optimizer.gates.values[name].detach()[units]
        return
    for weight, axis, owner in bench.produced(name):
        rows = torch.tensor([unit in units for unit in owner.tolist()])
        yield weight.detach().movedim(axis, 0)[rows]


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_gradients_are_those_of_the_whole_batch(mode):
    whole, parts = Bench(mode=mode), Bench(mode=mode)
    whole.steps(8)
    parts.steps(8, accumulate=4)
    assert whole.optimizer.plan == parts.optimizer.plan
    expected = whole.snapshot()
    for name, value in parts.snapshot().items():
        torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=0)


def test_processes_agree_on_saliency(tmp_path):
    """Each has its share of the batch; a wrapped model averages its own gradients alone."""
    context = multiprocessing.get_context("spawn")  # a forked process may inherit a lock that nobody releases
    results = context.Queue()
    workers = [
        context.Process(target=one_process, args=(rank, tmp_path, results), daemon=True) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert found == [[4.0] * 24] * 2  # the square of the mean of 1 and 3


def one_process(rank, folder, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    driven = Driven(2, memory=0.0)
    driven.step(torch.full((24,), (1.0, 3.0)[rank]))
    results.put(driven.optimizer.state_dict()["lhspg"]["saliency"][driven.name].tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_not_finite_stops_the_step_before_anything_changes(mode):
    bench = Bench(mode=mode)
    bench.steps(4)
    before, state = bench.snapshot(), copy.deepcopy(bench.optimizer.state_dict())
    (bench.loss(IDS) * float("nan")).backward()
    with pytest.raises(TrainingError, match="not finite at step 4"):
        bench.optimizer.step()
    for name, value in bench.snapshot().items():
        assert torch.equal(value, before[name]), name
    bench.optimizer.zero_grad()
    bench.optimizer.load_state_dict(state)
    bench.steps(4)
    undisturbed = Bench(mode=mode)
    undisturbed.steps(8)
    assert bench.optimizer.plan == undisturbed.optimizer.plan


@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_named_where_nothing_is_to_be_removed_too(mode):
    bench = Bench(mode=mode, units=None, remove=0.0)
    bench.steps(5)
    (bench.loss(IDS) * float("nan")).backward()
    with pytest.raises(TrainingError, match="not finite at step 5"):
        bench.optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_finite_stops_the_step_though_gradients_are(mode):
    bench = Bench(mode=mode)
    bench.steps(3)
    before = bench.snapshot()

    def closure() -> torch.Tensor:
        bench.loss(IDS).backward()
        return torch.tensor(float("nan"))

    with pytest.raises(TrainingError, match="the loss is not finite at step 3"):
        bench.optimizer.step(closure)
    assert all(torch.equal(value, before[name]) for name, value in bench.snapshot().items())


@pytest.mark.parametrize("mode", MODES)
def test_a_step_without_a_backward_is_refused(mode):
    bench = Bench(mode=mode)
    left = bench.optimizer.steps_left
    with pytest.raises(TrainingError, match="no gradient at step 0"):
        bench.optimizer.step()
    assert bench.optimizer.steps_left == left


@pytest.mark.parametrize("mistake", ["opened", "closed"])
def test_gradients_that_never_reach_the_gates_are_told_as_that(mistake):
    bench = Bench()
    if mistake == "closed":
        bench.optimizer.close()
        bench.loss(IDS).backward()
    else:
        with bench.optimizer.gates.opened():
            bench.loss(IDS).backward()
    with pytest.raises(
        TrainingError, match=r"no gradient has come to the gates(.|\n)*outside gates.opened\(\)"
    ):
        bench.optimizer.step()


def test_a_closure_is_called_and_its_loss_returned():
    by_closure, by_hand = Bench(), Bench()

    def closure() -> torch.Tensor:
        by_closure.optimizer.zero_grad()
        loss = by_closure.loss(IDS)
        loss.backward()
        return loss

    losses = [float(by_closure.optimizer.step(closure).detach()) for _ in range(2)]
    assert losses[0] == float(by_hand.loss(IDS).detach())
    by_hand.steps(2)
    for ours, theirs in zip(by_closure.adapters, by_hand.adapters):
        assert torch.equal(ours, theirs)


def test_there_is_no_plan_before_the_schedule_has_ended():
    bench = Bench()
    bench.steps(7)
    with pytest.raises(TrainingError, match="1 of 8 steps to go"):
        _ = bench.optimizer.plan
    bench.steps(1)
    assert bench.optimizer.plan


def test_gates_come_off():
    bench = Bench()
    before = bench.model(IDS).logits
    with torch.no_grad():
        for gate in bench.optimizer.gates.values.values():
            gate.zero_()
    assert not torch.allclose(bench.model(IDS).logits, before)
    bench.optimizer.close()
    assert torch.equal(bench.model(IDS).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn": 48}, "cannot lose 48"),
        ({"ffn": 1.5}, r"cannot lose 1\.5"),
        ({"warmup_steps": 2.5}, "warmup_steps is 2.5"),
        ({"period_steps": 2.5}, "period_steps is 2.5"),
        ({"periods": 1.5}, "periods is 1.5"),
        ({"units": {"nothing": 1}}, "'nothing' is not among the groups"),
        ({"periods": 0}, "removes nothing"),
        ({"period_steps": 0}, "removes nothing"),
        ({"half_space": 1.0}, "half_space is 1.0"),
        ({"memory": 1.5}, "memory is 1.5"),
        ({"scores": {"nothing": torch.zeros(1)}}, "scores has no"),
        ({"mode": "fast"}, "no mode 'fast'"),
        ({"paper": gp.PaperChoices()}, "paper is of the paper mode alone"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(TrainingError, match=message):
        Bench(**options)


def test_plain_parameters_are_refused_and_the_way_is_shown():
    with pytest.raises(TrainingError, match=r"given a list\n.*param_groups\(model, groups\)"):
        gp.LHSPG([nn.Parameter(torch.ones(1))])
