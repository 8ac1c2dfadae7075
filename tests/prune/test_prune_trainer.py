"""LHSPG within transformers' Trainer: as in a plain loop, interrupted or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lhspg_bench import IDS, Bench
from transformers import Trainer, TrainerCallback, TrainingArguments

import graphprune as gp
from graphprune.errors import TrainingError

LINES = [{"input_ids": line, "labels": line} for line in IDS[:2]]


def trainer(bench: Bench, folder: Path, *callbacks: TrainerCallback, batch: int = 2, **settings) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2 // batch,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"lr_scheduler_type": "constant", "max_steps": 9, "save_steps": 4, "logging_steps": 1, **settings},
    )
    return Trainer(
        bench.model,
        arguments,
        train_dataset=LINES,
        optimizers=(bench.optimizer, None),
        callbacks=[gp.LHSPGCallback(bench.optimizer), *callbacks],
    )


def assert_alike(first: Bench, second: Bench, tolerance: float) -> None:
    assert first.optimizer.plan == second.optimizer.plan
    assert {name: len(units) for name, units in first.optimizer.plan.items()} == first.units
    expected = second.snapshot()
    for name, value in first.snapshot().items():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=["gated", "paper"])
def whole(request, tmp_path_factory) -> tuple[str, Bench, Trainer]:
    bench = Bench(mode=request.param)
    folder = tmp_path_factory.mktemp(request.param)
    ran = trainer(bench, folder)
    ran.train()
    return request.param, bench, ran


def test_it_does_what_a_plain_loop_does(whole):
    mode, bench, _ = whole
    plain = Bench(mode=mode)
    for _ in range(9):
        plain.optimizer.zero_grad()
        plain.model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.adapters, 1.0)
        plain.optimizer.step()
    assert_alike(bench, plain, 1e-3)


def test_gradient_accumulation_counts_as_one_step(whole, tmp_path):
    mode, bench, _ = whole
    accumulated = Bench(mode=mode)
    trainer(accumulated, tmp_path, batch=1).train()
    assert_alike(accumulated, bench, 1e-3)


def test_the_plan_is_written_and_progress_logged(whole):
    _, bench, ran = whole
    assert gp.Plan.load(Path(ran.args.output_dir) / "plan.json") == bench.optimizer.plan
    zeroed = [row["lhspg_zeroed"] for row in ran.state.log_history if "loss" in row]
    assert zeroed == [0, 0, 0, 0, 8, 8, 8, 18, 18]


class Poison(TrainerCallback):
    """Makes the sixth step's loss not a number, as an overflow would."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            with torch.no_grad():
                self.bench.adapters[0].fill_(float("nan"))


def test_not_a_number_stops_the_step_and_the_last_checkpoint_goes_on_in_the_middle_of_a_period(
    whole, tmp_path
):
    mode, bench, _ = whole
    failing = Bench(mode=mode)
    with pytest.raises(TrainingError, match="not finite at step 5"):
        trainer(failing, tmp_path, Poison(failing)).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = Bench(mode=mode)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=True)
    assert_alike(resumed, bench, 1e-5)


def test_a_training_that_is_too_short_is_refused_before_it_starts(tmp_path):
    bench = Bench()
    before = bench.snapshot()
    with pytest.raises(TrainingError, match="has 7 steps, and LHSPG needs 8"):
        trainer(bench, tmp_path, max_steps=7).train()
    for name, value in bench.snapshot().items():
        assert torch.equal(value, before[name])


def test_steps_at_a_learning_rate_of_zero_are_none_that_the_schedule_has(tmp_path):
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    with pytest.raises(TrainingError, match="8 steps, 1 of them at a learning rate of zero"):
        trainer(Bench(), tmp_path, max_steps=8, **settings).train()
    bench = Bench()
    trainer(bench, tmp_path, max_steps=9, **settings).train()
    assert bench.optimizer.steps_left == 0


def test_a_trainer_that_was_not_given_the_optimizer_is_refused(tmp_path):
    bench = Bench()
    ran = trainer(bench, tmp_path)
    ran.optimizer = None
    with pytest.raises(
        TrainingError, match=r"does not train with this LHSPG\n.*optimizers=\(optimizer, None\)"
    ):
        ran.train()


def test_going_back_to_adapters_of_another_step_is_refused(tmp_path):
    again = trainer(Bench(), tmp_path)
    again.args.load_best_model_at_end = True
    with pytest.raises(TrainingError, match="load_best_model_at_end"):
        again.train()


def test_the_optimizer_alone_does_not_load_transformers():
    code = "import graphprune, sys; graphprune.LHSPG, graphprune.param_groups; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
