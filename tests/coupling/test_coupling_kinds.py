"""The kind of a group is what operators do with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.trace.model import trace


def groups_of(model: nn.Module, inputs: dict[str, Tensor]) -> NodeGroups:
    return node_groups(trace(model, inputs))


class Waist(nn.Module):
    """Two linear maps in a row, with another beside them or without."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(7, 3)
        self.a, self.b = nn.Linear(8, 4, bias=False), nn.Linear(4, 7, bias=False)
        self.beside = nn.Linear(8, 7) if beside else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.b(self.a(x))
        return self.last(y if self.beside is None else y + self.beside(x))


def test_a_waist_is_a_low_rank_update_only_beside_a_weight():
    inputs = {"x": torch.randn(2, 5)}
    kinds = {
        beside: next(g.kind for g in groups_of(Waist(beside), inputs).values() if g.size == 4)
        for beside in (True, False)
    }
    assert kinds == {True: "lora_rank", False: "other"}


class FactoredTable(nn.Module):
    """A table read by number, in two factors; beside a whole table they are an update of it."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.rows, self.factor = nn.Parameter(torch.randn(4, 31)), nn.Linear(4, 8, bias=False)
        self.table = nn.Embedding(31, 8) if beside else None
        self.last = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.factor(nn.functional.embedding(ids, self.rows.t()))
        return self.last(y if self.table is None else y + self.table(ids))


def test_so_is_one_of_a_table():
    inputs = {"ids": torch.randint(0, 31, (2, 11))}
    for beside in (True, False):
        groups = groups_of(FactoredTable(beside), inputs)
        assert next(g.kind for g in groups.values() if g.size == 4) == ("lora_rank" if beside else "other")
        assert {g.kind for g in groups.values() if g.size == 31} == {"vocabulary"}


class WrittenAttention(nn.Module):
    """Attention in einsum, its weights with an axis of their own for heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = (nn.Parameter(torch.randn(9, 2, 4)) for _ in "qk")
        self.v, self.o = nn.Parameter(torch.randn(9, 2, 5)), nn.Parameter(torch.randn(9, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("ibh,hnd->ibnd", x, weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("ibnd,jbnd->bnij", q, k).softmax(-1)
        return torch.einsum("ibnd,hnd->ibh", torch.einsum("bnij,jbnd->ibnd", scores, v), self.o)


def test_attention_written_in_einsum_has_heads_and_their_widths():
    groups = groups_of(WrittenAttention(), {"x": torch.randn(11, 3, 9)})
    found = {group.size: group.kind for group in groups.prunable()}
    assert found == {2: "attention_heads", 4: "head_dim", 5: "head_dim"}
