"""Operators that lay units out otherwise, or sum over them, between two layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.certify.certificate import certify
from graphprune.coupling.groups import node_groups
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.shrink.weights import zero_weight
from graphprune.trace.model import trace


class Between(nn.Module):
    """A layer that makes 12 channels, an operator, and a layer that reads what it returns."""

    def __init__(self, operator: Callable[[Tensor], Tensor], width: int, rows: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.operator, self.rows = nn.Linear(5, 12), nn.Linear(width, 3), operator, rows

    def forward(self, x: Tensor) -> Tensor:
        image = self.up(x).tanh().unsqueeze(-1).unsqueeze(-1)
        column = torch.arange(1, 1 + 4 * self.rows).double().cos().view(2 * self.rows, 2)
        return self.down(self.operator(image * column).flatten(2).sum(-1))


# Sizes of the prunable groups: a shuffle with three groups has groups and places in a group that may go.
CASES: dict[str, tuple[Between, list[int]]] = {
    "channel_shuffle": (Between(lambda x: nn.functional.channel_shuffle(x, 3), 12), [3, 4]),
    "pixel_unshuffle": (Between(lambda x: nn.functional.pixel_unshuffle(x, 2), 48), [12]),
    "unfold": (Between(lambda x: nn.functional.unfold(x, (2, 1), padding=1), 24), [12]),
    "unfold along one axis": (Between(lambda x: x.unfold(2, 3, 1).flatten(2), 12, rows=2), [12]),
    "pixel_shuffle": (Between(lambda x: nn.functional.pixel_shuffle(x, 2), 3), [3]),
}


@pytest.mark.parametrize("case", CASES)
def test_units_that_are_laid_out_otherwise_may_go(case):
    model, expected = CASES[case]
    model, inputs = model.double().eval(), {"x": torch.randn(7, 5).double()}
    groups = node_groups(trace(model, inputs))
    assert sorted(group.size for group in groups.prunable()) == expected
    certify(model, groups, inputs).raise_if_failed()
    plan = Plan({group.name: [0] for group in groups.prunable()})
    small = shrink(model, groups, plan, inputs, form="graph")
    zeroed = Between(model.operator, model.down.in_features, model.rows).double()
    zeroed.load_state_dict(
        {name: zero_weight(name, w, groups, plan.kept(groups)) for name, w in model.state_dict().items()}
    )
    assert torch.allclose(small(**inputs), zeroed(**inputs), atol=1e-12)
    assert not torch.allclose(zeroed(**inputs), model(**inputs), atol=1e-3)


class Similar(nn.Module):
    """How alike two layers' outputs are, along their units or along their positions."""

    def __init__(self, dim: int, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.down = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.dim, self.activation = dim, activation

    def forward(self, x: Tensor) -> Tensor:
        alike = torch.cosine_similarity(self.a(x), self.activation(self.b(x)), dim=self.dim)
        return self.down(alike) if self.dim == 1 else alike


@pytest.mark.parametrize("dim", [1, -1])
def test_cosine_similarity_couples_a_pair(dim):
    model, inputs = Similar(dim).double(), {"x": torch.randn(2, 7, 5).double()}
    groups = node_groups(trace(model, inputs))
    (width,) = groups.prunable()
    read = {"down.weight"} if dim == 1 else set()
    wanted = {"a.weight", "a.bias", "b.weight", "b.bias"} | read
    assert {member.parameter for member in width.members} == wanted
    certify(model, groups, inputs).raise_if_failed()


def test_cosine_similarity_minds_a_unit_that_does_not_vanish():
    """The length of the second vector counts units that are one when their weights are zero."""
    model, inputs = Similar(-1, torch.exp).double(), {"x": torch.randn(2, 7, 5).double()}
    groups = node_groups(trace(model, inputs))
    certify(model, groups, inputs).raise_if_failed()
    (width,) = [group for group in groups.values() if group.size == 8]
    assert "aten.cosine_similarity.default sums over units that are not zero" in width.reason
