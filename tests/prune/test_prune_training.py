from __future__ import annotations

import pytest
import torch
from lhspg_bench import IDS, Bench
from torch import nn

from graphprune.errors import TrainingError
from graphprune.prune.precision import frozen_in_bfloat16, use_bfloat16
from graphprune.prune.training import Objective, logits_of, train
from graphprune.recipe import Training
from graphprune.source.text import IGNORED, Batch


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


def test_only_labelled_tokens_count():
    """In loss and distillation: against both on the labelled positions alone, in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    labels = torch.full((2, 5), IGNORED)
    labels[0, 3:], labels[1, 1] = ids[0, 3:], ids[1, 1]
    total = Objective(lambda _: student, lambda _: teacher, 0.7, False)(Batch(ids, labels))
    expected = 0.0
    for row, place in ((0, 3), (0, 4), (1, 1)):
        p, q = (t[row, place - 1].double().softmax(-1) for t in (teacher, student))
        expected += float(-q[ids[row, place]].log() + 0.7 * (p * (p / q).log()).sum()) / 3
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_batches_of_one_step_count_by_their_tokens():
    """Two small batches make the step of the whole, though they hold different numbers of learned tokens."""
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:2, 2:] = IGNORED

    def stepped(parts, accumulate):
        parameter = nn.Parameter(table.clone())
        rows = train(
            iter(parts), Objective(lambda batch: parameter[batch], None, 0.0, False),
            torch.optim.SGD([parameter], lr=1.0),
            steps=1, warmup=0, trainable=[parameter], accumulate=accumulate,
        )  # fmt: skip
        return parameter.detach(), rows[0]["loss"]

    whole, loss = stepped([Batch(ids, labels)], 1)
    halves, summed = stepped([Batch(ids[:2], labels[:2]), Batch(ids[2:], labels[2:])], 2)
    torch.testing.assert_close(halves, whole)
    assert summed == pytest.approx(loss)
    assert not torch.equal(whole, table)


def test_a_part_of_a_schedule_goes_on_where_the_one_before_ended():
    def rates(*spans, first=5):
        parameter = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        return [
            (row["step"], row["learning_rate"])
            for span in spans
            for row in train(
                iter([IDS] * 10), lambda ids: (parameter**2).sum(), optimizer,
                steps=10, warmup=2, trainable=[parameter], first=first, span=span,
            )
        ]  # fmt: skip

    assert rates(range(5, 8), range(8, 15)) == rates(None)
    assert [(step + 5, rate) for step, rate in rates(None, first=0)] == rates(None)


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
