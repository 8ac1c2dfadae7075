"""The certificate sees to it that members, which is what people read, are complete and right."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from examined_networks import examine
from generated_blocks import Ladder, Rearranged
from generated_networks import Network, Node
from torch import Tensor, nn

from graphprune.certify.certificate import certify
from graphprune.certify.membership import wrong_members
from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.coupling.node_group import Member, NodeGroup
from graphprune.errors import VerificationError
from graphprune.trace.model import trace


class Attention(nn.Module):
    """A block with every sort of member: produced, consumed and carried, and a shared buffer that is selected."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.norm = nn.Linear(3, 8), nn.RMSNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.up, self.down, self.last = nn.Linear(8, 12), nn.Linear(6, 8), nn.Linear(8, 2)
        self.register_buffer("frequencies", torch.rand(2))

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2]).unsqueeze(-1) * self.frequencies
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        q, k, v = (
            y.view(*y.shape[:-1], 2, 4).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.last(x + self.down(gate.sigmoid() * up))


INPUTS = {"x": torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Attention().eval()


@pytest.fixture(scope="module")
def groups(model: nn.Module) -> NodeGroups:
    return node_groups(trace(model, INPUTS))


def altered(groups: NodeGroups, name: str, change: Callable[[NodeGroup], NodeGroup]) -> NodeGroups:
    twin = copy.copy(groups)
    twin._groups = {**groups._groups, name: change(groups[name])}
    return twin


def test_members_of_every_sort_are_there_and_right(model, groups):
    sides = {member.side for group in groups.values() for member in group.members}
    assert sides == {"produces", "consumes", "carries", "selected"}
    assert wrong_members(groups) == {}
    assert certify(model, groups, INPUTS).ok


def test_a_certificate_fails_whichever_member_is_left_out(model, groups):
    for group in groups.values():
        for member in group.members:

            def without(group: NodeGroup, member: Member = member) -> NodeGroup:
                return dataclasses.replace(group, members=tuple(m for m in group.members if m is not member))

            certificate = certify(model, altered(groups, group.name, without), INPUTS)
            assert not certificate.ok
            assert group.name in certificate.failures
            with pytest.raises(VerificationError, match=f"lacks axis {member.axis} of {member.parameter}"):
                certificate.raise_if_failed()


def test_what_members_name_is_what_is_zeroed(model, groups):
    """A producer that is left out keeps its units; then removing is not the same as zeroing."""
    for group in groups.prunable():

        def only_consumers(group: NodeGroup) -> NodeGroup:
            return dataclasses.replace(group, members=tuple(m for m in group.members if m.side == "selected"))

        certificate = certify(model, altered(groups, group.name, only_consumers), INPUTS)
        assert certificate.removed_max_error > 1e-6


def test_a_certificate_fails_where_a_member_is_not_the_groups_own(model, groups):
    ffn, hidden = (next(g for g in groups.values() if g.kind == kind) for kind in ("ffn", "hidden"))
    foreign = next(member for member in ffn.members if member.parameter == "down.weight")

    def with_foreign(group: NodeGroup) -> NodeGroup:
        return dataclasses.replace(group, members=(*group.members, foreign))

    certificate = certify(model, altered(groups, hidden.name, with_foreign), INPUTS)
    assert certificate.wrong_members == (f"{hidden.name}: it has no units on axis 1 of down.weight",)


def test_a_certificate_fails_where_a_member_names_other_indices(model, groups):
    """The fused weight taken for queries alone: of three places, a unit owns one."""
    (heads,) = [group for group in groups.values() if group.kind == "attention_heads"]
    out = next(member for member in heads.members if member.parameter == "out.weight")

    def misread(group: NodeGroup) -> NodeGroup:
        members = [
            dataclasses.replace(m, layout=out.layout) if m.parameter == "qkv.weight" else m
            for m in group.members
        ]
        return dataclasses.replace(group, members=tuple(members))

    certificate = certify(model, altered(groups, heads.name, misread), INPUTS)
    assert not certificate.ok
    assert any("other indices on axis 0 of qkv.weight" in fault for fault in certificate.wrong_members)


def test_an_axis_that_holds_a_group_twice_is_no_fault():
    """Rows and columns of a square are tied to each other: an index belongs to a unit of each, and none can go."""
    ladder = Ladder((3, 6))
    shared = [Node((place,), "first", ladder, residual=True, shares=0) for place in (1, 2, 4)]
    square = Node((3,), "first", Rearranged((8, 2), (1, 0), (False, False)), residual=False, shares=None)
    first = Node((0,), "first", ladder, residual=False, shares=None)
    nodes = (first, *shared[:2], square, shared[2])
    network = Network(tokens=False, tied=False, width=16, nodes=nodes, length=5, seed=0)
    examined = examine(network)
    assert any("holds it twice" in (group.reason or "") for group in examined.groups.values())
    assert wrong_members(examined.groups) == {}
