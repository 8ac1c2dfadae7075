"""The loss over a large vocabulary, against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphprune.prune import token_loss as module
from graphprune.prune.token_loss import token_loss
from graphprune.source.text import IGNORED


def defined(student: Tensor, teacher: Tensor | None, targets: Tensor, distill: float) -> Tensor:
    """The formula, term by term."""
    kept = targets != IGNORED
    q = student[kept].log_softmax(-1)
    loss = -q[torch.arange(len(q)), targets[kept]]
    if teacher is not None:
        p = teacher[kept].log_softmax(-1)
        loss = loss + distill * (p.exp() * (p - q)).sum(-1)
    return loss.mean()


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 11),
    chunk=st.integers(1, 40),
    distill=st.sampled_from([0.0, 0.7, 4.0]),
    taught=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_those_of_the_definition(tokens, vocabulary, chunk, distill, taught, seed):
    """However many rows are in work at a time, in float64; rows not learned may hold anything."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        3 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    ignored = torch.rand(tokens, generator=generator) < 0.3
    ignored[0] = False
    targets[ignored] = IGNORED
    student[ignored] = torch.nan
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        loss = token_loss(first, teacher if taught else None, targets, distill)
    expected = defined(second, teacher if taught else None, targets, distill)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    learned = ~ignored
    torch.testing.assert_close(first.grad[learned], second.grad[learned])
    assert not first.grad[ignored].any()


def test_bfloat16_logits_are_summed_in_float32():
    """The loss is that of the rounded logits, and only its gradient is rounded again."""
    student = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(40)
    rounded = student.clone().requires_grad_()
    exact = student.double().requires_grad_()
    loss = token_loss(rounded, None, targets, 0.0)
    expected = defined(exact, None, targets, 0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.grad.double(), exact.grad, rtol=2**-8, atol=1e-7)


def test_without_gradient_nothing_is_kept():
    """Measuring takes no memory of the logits' size beside them."""
    student = torch.randn(4, 5)
    assert not token_loss(student, None, torch.arange(4), 0.0).requires_grad


def test_a_certain_teacher_adds_nothing_where_the_student_agrees():
    """Both all but certain of the same token: no loss, no slope, no NaN."""
    certain = torch.zeros(2, 3)
    certain[:, 1] = 200.0
    student = certain.clone().requires_grad_()
    loss = token_loss(student, certain, torch.ones(2, dtype=torch.long), 2.0)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
