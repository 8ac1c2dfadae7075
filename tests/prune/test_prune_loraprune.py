"""LoRAPrune as an optimizer: its schedule, its importance against the formula, its masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lhspg_bench import IDS, adapted_llama, llama_groups, units_of
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import TrainingError
from graphprune.prune.cubic_schedule import CubicSchedule
from graphprune.prune.loraprune import LoRAPrune
from graphprune.prune.training import Objective, logits_of


@given(
    steps=st.integers(1, 500),
    warmup=st.floats(0, 0.5),
    cooldown=st.floats(0, 0.45),
    every=st.integers(1, 60),
)
def test_the_share_rises_from_nothing_to_all_and_the_last_removal_completes_it(
    steps, warmup, cooldown, every
):
    schedule = CubicSchedule(steps, warmup, cooldown, every)
    shares = [schedule.share(step) for step in range(steps + 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(share == 0 for step, share in enumerate(shares) if step <= warmup * steps)
    assert all(share == 1 for step, share in enumerate(shares) if step >= (1 - cooldown) * steps)
    due = [step for step in range(1, steps + 1) if schedule.is_due(step)]
    assert shares[due[-1]] == 1
    assert all(step % every == 0 and 0 < shares[step] < 1 for step in due[:-1])


def test_the_share_is_the_papers_cubic():
    schedule = CubicSchedule(1000)
    assert [schedule.share(step) for step in (0, 100, 900, 1000)] == [0, 0, 1, 1]
    for step in (101, 300, 500, 899):
        assert schedule.share(step) == pytest.approx(1 - (1 - (step - 100) / 800) ** 3)
    assert [step for step in range(1001) if schedule.is_due(step)] == [*range(110, 901, 10)]
    assert not any(CubicSchedule(45).is_due(step) for step in range(42, 46))
    assert CubicSchedule(45).is_due(41)  # 40.5 is not a step: the first one after it


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"warmup": 0.5, "cooldown": 0.5}, {"every": 0}])
def test_a_schedule_that_removes_nothing_is_refused(wrong):
    with pytest.raises(TrainingError, match="removes nothing"):
        CubicSchedule(**{"steps": 10, **wrong})


class LoRABench:
    """A tiny Llama with adapters, its B not zero, and LoRAPrune on its channels and heads."""

    def __init__(self, schedule: CubicSchedule | None = None, **options) -> None:
        self.model = adapted_llama()
        generator = torch.Generator().manual_seed(2)
        self.adapters = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in self.adapters:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        self.groups = llama_groups()
        self.units = units_of(self.groups)
        settings = {"lr": 1e-2, "units": self.units, **options}
        self.optimizer = LoRAPrune(
            gp.param_groups(self.model, self.groups),
            schedule=schedule or CubicSchedule(20, every=3),
            **settings,
        )
        self.loss = Objective(logits_of(self.model), None, 0.0, False)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss(IDS).backward()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.backward()
            self.optimizer.step()


def test_masks_only_grow_and_end_in_the_counts_that_were_asked_for():
    bench = LoRABench()
    before = {name: torch.zeros(bench.groups[name].size, dtype=torch.bool) for name in bench.units}
    counts = []
    for step in range(1, 21):
        bench.steps(1)
        for name, gone in before.items():
            now = bench.optimizer.redundant(name)
            assert bool((now | ~gone).all())
            share = bench.optimizer._schedule.share(step - step % 3 if step < 18 else 18)
            assert int(now.sum()) == int(bench.units[name] * share)
            before[name] = now.clone()
        counts.append(bench.optimizer.counts["zeroed"])
    assert counts[1] == 0
    assert counts[17] == counts[19] == sum(bench.units.values())
    assert 0 < counts[8] < counts[17]
    assert {name: len(units) for name, units in bench.optimizer.plan.items()} == bench.units


def dense_importance(bench: LoRABench, name: str, released: bool) -> Tensor:
    """Score a group's units by the formula on dense matrices, in float64, unit by unit."""
    scores = torch.zeros(bench.groups[name].size, dtype=torch.float64)
    for member in bench.groups[name].members:
        if not member.parameter.endswith("base_layer.weight"):
            continue
        layer = bench.model.get_submodule(member.parameter.removesuffix(".base_layer.weight"))
        a, b = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
        up, down, grad_up, grad_down = (t.detach().double() for t in (b, a, b.grad, a.grad))
        surrogate = grad_up @ down + up @ grad_down - grad_up @ grad_down
        merged = (layer.base_layer.weight + layer.get_delta_weight("default")).detach().double()
        elements = (surrogate * merged).abs() if released else (surrogate * merged).square()
        part = torch.stack(
            [
                elements.index_select(member.axis, torch.from_numpy(bench.groups[name].indices(member, unit))).sum()
                for unit in range(len(scores))
            ]
        )  # fmt: skip
        scores += part / (part.norm() + 1e-8) if released else part
    return scores


@pytest.mark.parametrize("released", [False, True])
def test_importance_is_a_running_mean_of_the_formula(released):
    bench = LoRABench(CubicSchedule(100), released=released, memory=0.8)
    expected = {name: torch.zeros(bench.groups[name].size, dtype=torch.float64) for name in bench.units}
    for _ in range(3):
        bench.backward()
        for name in expected:
            expected[name] = 0.8 * expected[name] + 0.2 * dense_importance(bench, name, released)
        bench.optimizer.step()
    for name, score in expected.items():
        torch.testing.assert_close(bench.optimizer._importance[name].double(), score, rtol=1e-4, atol=1e-9)


def test_the_least_important_of_each_group_go():
    bench = LoRABench(CubicSchedule(1))
    bench.backward()
    expected = {
        name: dense_importance(bench, name, False).argsort()[:count].sort().values.tolist()
        for name, count in bench.units.items()
    }
    bench.optimizer.step()
    assert {name: list(units) for name, units in bench.optimizer.plan.items()} == expected


def test_what_is_masked_can_be_cut_out_queries_and_their_shared_keys_together():
    bench = LoRABench()
    bench.steps(20)
    with torch.no_grad():
        masked = bench.model(IDS).logits
        bench.optimizer.close()
        small = gp.shrink(bench.model, bench.groups, bench.optimizer.plan)
        torch.testing.assert_close(small(IDS).logits, masked, atol=1e-5, rtol=0)
    attention = small.base_model.model.model.layers[0].self_attn
    assert attention.k_proj.base_layer.weight.shape[0] == 8
    assert attention.q_proj.base_layer.weight.shape[0] == 16


def test_nothing_is_scored_once_all_are_gone():
    bench = LoRABench(CubicSchedule(10, every=2))
    bench.steps(9)
    before = {name: score.clone() for name, score in bench.optimizer._importance.items()}
    bench.steps(3)
    assert all(torch.equal(before[name], score) for name, score in bench.optimizer._importance.items())


def test_stopped_and_resumed_it_ends_the_same():
    whole, first, second = (LoRABench() for _ in range(3))
    whole.steps(20)
    first.steps(11)
    with torch.no_grad():
        for old, new in zip(first.adapters, second.adapters):
            new.copy_(old)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.steps(9)
    assert second.optimizer.plan == whole.optimizer.plan
    for one, other in zip(whole.adapters, second.adapters):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    with pytest.raises(TrainingError, match="not the state of LoRAPrune"):
        second.optimizer.load_state_dict(torch.optim.AdamW(second.adapters).state_dict())


def test_no_activation_outlives_a_step():
    bench = LoRABench()
    bench.steps(1)
    assert not bench.optimizer.gates._made


def test_within_transformers_trainer_the_callback_serves_it_too(tmp_path):
    from transformers import Trainer, TrainingArguments

    bench = LoRABench(CubicSchedule(6, every=2))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=1, lr_scheduler_type="constant", save_strategy="no",
    )  # fmt: skip
    lines = [{"input_ids": line, "labels": line} for line in IDS[:2]]
    callback = gp.LHSPGCallback(bench.optimizer)
    trainer = Trainer(
        bench.model, arguments, train_dataset=lines, optimizers=(bench.optimizer, None), callbacks=[callback]
    )
    trainer.train()
    gone = [row["loraprune_zeroed"] for row in trainer.state.log_history if "loss" in row]
    assert gone == sorted(gone)
    assert gone[-1] == sum(bench.units.values())
    assert gp.Plan.load(tmp_path / "plan.json") == bench.optimizer.plan
    longer = LoRABench(CubicSchedule(9))
    trainer.callback_handler.callbacks = [gp.LHSPGCallback(longer.optimizer)]
    trainer.optimizer = longer.optimizer
    with pytest.raises(TrainingError, match="has 6 steps, and LoRAPrune needs 9"):
        trainer.train()


def test_with_nothing_to_remove_it_is_adamw():
    ours, theirs = LoRABench(units={}), LoRABench(units={})
    plain = torch.optim.AdamW(theirs.adapters, lr=1e-2, weight_decay=0.0)
    ours.steps(4)
    for _ in range(4):
        theirs.backward()
        plain.step()
    assert not ours.optimizer.plan
    assert all(torch.equal(one, other) for one, other in zip(ours.adapters, theirs.adapters))


def test_steps_at_a_learning_rate_of_zero_do_not_count():
    bench = LoRABench(lr=0.0)
    bench.steps(25)
    assert bench.optimizer.counts["zeroed"] == 0
    with pytest.raises(TrainingError, match="has done 0 of 20 steps"):
        _ = bench.optimizer.plan


def test_a_gradient_that_is_no_number_changes_nothing():
    bench = LoRABench(CubicSchedule(1))
    bench.backward()
    bench.adapters[3].grad[0, 0] = float("nan")
    before = [p.detach().clone() for p in bench.adapters]
    with pytest.raises(TrainingError, match="not finite at step 0; nothing was changed"):
        bench.optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, bench.adapters))
    assert bench.optimizer.counts["zeroed"] == 0


def test_a_step_without_gradients_is_refused_and_the_step_is_named_with_nothing_to_remove():
    bench = LoRABench()
    with pytest.raises(TrainingError, match="no gradient at step 0"):
        bench.optimizer.step()
    idle = LoRABench(units={})
    idle.steps(5)
    (idle.loss(IDS) * float("nan")).backward()
    with pytest.raises(TrainingError, match="not finite at step 5"):
        idle.optimizer.step()


def test_a_closure_is_called_and_its_loss_returned():
    by_closure, by_hand = LoRABench(), LoRABench()

    def closure():
        by_closure.backward()
        return by_closure.loss(IDS)

    assert float(by_closure.optimizer.step(closure).detach()) == float(by_hand.loss(IDS).detach())
    by_hand.steps(1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_closure.adapters, by_hand.adapters))


def test_exempt_groups_stay_whole_and_the_others_make_up_for_them():
    first = [name for name in units_of(llama_groups()) if "layers.0" in name]
    plans = []
    for exempt in ((), first):
        bench = LoRABench(units=None, remove=0.2, width_multiple={"ffn": 4}, exempt=exempt)
        bench.steps(20)
        plans.append(bench.optimizer.plan)
    assert set(first) & set(plans[0])
    assert not set(first) & set(plans[1])
    removed = [
        sum(len(units) * llama_groups()[name].parameters_per_unit for name, units in plan.items())
        for plan in plans
    ]
    assert abs(removed[0] - removed[1]) < 0.25 * removed[0]
    for options in ({"exempt": first}, {"exempt": "layers.0", "units": None}):
        with pytest.raises(TrainingError, match="not among the groups that may lose units"):
            LoRABench(**options)


def test_plain_parameters_are_refused_and_the_way_is_shown():
    with pytest.raises(TrainingError, match=r"given a list\n.*LoRAPrune\(param_groups\(model, groups\)"):
        gp.LoRAPrune([nn.Parameter(torch.ones(1))], schedule=gp.CubicSchedule(4))


def test_a_share_of_parameters_takes_the_same_share_of_each_kind():
    bench = LoRABench(units=None, remove=0.43, width_multiple={"ffn": 4})
    bench.steps(20)
    kinds = {}
    for name, units in bench.optimizer.plan.items():
        kinds.setdefault(bench.groups[name].kind, set()).add(len(units) / bench.groups[name].size)
    assert kinds == {"ffn": {0.5}, "attention_heads": {0.5}}


def test_a_unit_without_adapters_has_no_importance():
    from peft import LoraConfig, get_peft_model
    from tiny_models import tiny_llama

    from graphprune.source.model import example_inputs

    model: nn.Module = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    groups = gp.node_groups(gp.trace(model, example_inputs(model)))
    with pytest.raises(TrainingError, match=r"none of the weights of '.*' carries a low-rank adapter"):
        LoRAPrune(gp.param_groups(model, groups), schedule=CubicSchedule(4), units=units_of(groups))
