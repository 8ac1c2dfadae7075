"""Operators whose operands do not all have a say, in networks that must keep their two widths apart or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.certify.certificate import certify
from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.trace.model import trace

Between = Callable[[Tensor, Tensor], Tensor]


class TwoWidths(nn.Module):
    """Two hidden layers; what becomes of the second is told by `between`, which sees both."""

    def __init__(self, between: Between, second: int = 20) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.a, self.b = nn.Linear(6, 20), nn.Linear(6, second)
        self.c, self.d = nn.Linear(20, 4), nn.Linear(20, 4)
        if second != 20:
            self.d = nn.Linear(second, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x).relu()
        return self.c(first) + self.d(self.between(self.b(x).relu(), first))


INPUTS = {"x": torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).double()}


def certified(model: nn.Module) -> NodeGroups:
    groups = node_groups(trace(model, INPUTS))
    certify(model, groups, INPUTS).raise_if_failed()
    return groups


def prunable_sizes(groups: NodeGroups) -> list[int]:
    return sorted(group.size for group in groups.values() if group.prunable)


APART: dict[str, Between] = {
    "type_as": lambda second, first: second.type_as(first),
    "to another's type": lambda second, first: second.to(first),
    "type_as of a mask": lambda second, first: second * (second > 0.1).type_as(first),
    "filled with a number of another": lambda second, first: second.masked_fill(
        second > 1, first.detach().sum()
    ),
    "new": lambda second, first: second + first.new_ones(()),
}


@pytest.mark.parametrize("case", APART)
def test_an_operand_that_gives_its_type_or_a_number_couples_nothing(case):
    assert prunable_sizes(certified(TwoWidths(APART[case]).double())) == [20, 20]


@pytest.mark.parametrize("width", [13, 1])
def test_type_as_takes_any_shape(width):
    groups = certified(TwoWidths(APART["type_as"], width).double())
    assert prunable_sizes(groups) == [size for size in (width, 20) if size > 1]


def test_a_constant_cast_for_one_reader_stays_free_for_the_others():
    """One table, cast to the type of what the parameters computed, scales two layers that are not coupled by it."""

    class Shared(TwoWidths):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.ones(20, dtype=torch.float32) * 2
            first, second = self.a(x).relu(), self.b(x).relu()
            table = table.type_as(first)
            return self.c(first * table) + self.d(second * table)

    assert prunable_sizes(certified(Shared(APART["type_as"]).double())) == [20, 20]


TOGETHER: dict[str, Between] = {
    "view_as": lambda second, first: second.view_as(first),
    "reshape_as": lambda second, first: second.reshape_as(first),
    "expand_as": lambda second, first: second * first.mean(0, keepdim=True).expand_as(second),
    "ones_like": lambda second, first: second + torch.ones_like(first),
    "copied into": lambda second, first: torch.zeros_like(first).copy_(second),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_an_operand_that_gives_its_shape_is_coupled(case):
    model = TwoWidths(TOGETHER[case]).double()
    groups = certified(model)
    assert prunable_sizes(groups) == [20]
    (name,) = [name for name, group in groups.items() if group.prunable]
    small = shrink(model, groups, Plan({name: [0, 7, 11]}), INPUTS, form="graph")
    assert torch.isfinite(small(**INPUTS)).all()


def test_a_row_expanded_as_another_value_takes_its_units():
    """The expanded row has one index of its own width, and all units of the other's."""
    groups = certified(
        TwoWidths(lambda second, first: second.sum(-1, keepdim=True).expand_as(first)).double()
    )
    by_size = {
        g.size: {m.parameter for m in g.members} for g in groups.values() if "d.weight" in str(g.members)
    }
    assert by_size[20] == {"a.weight", "a.bias", "c.weight", "d.weight"}


class Winners(nn.Module):
    """A hidden layer of which `choose` leaves only some units."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.choose = nn.Linear(6, 20), nn.Linear(20, 4), choose

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.choose(self.up(x)))


VALUES_ALONE = {
    "top-k": lambda x: x * (x >= x.topk(9, -1).values[..., -1:]),
    "mean of the top-k": lambda x: x * (x >= x.topk(9, -1).values.mean(-1, keepdim=True)),
    "k-th value": lambda x: x * (x >= x.kthvalue(9, -1, keepdim=True).values),
    "median": lambda x: x * (x >= x.median(-1, keepdim=True).values),
}


@pytest.mark.parametrize("case", VALUES_ALONE)
def test_a_threshold_among_units_keeps_them_all(case):
    """Another unit's value becomes the threshold when one goes: removing is not the same as zeroing."""
    groups = certified(Winners(VALUES_ALONE[case]).double())
    (width,) = [group for group in groups.values() if group.size == 20]
    assert (width.permutable, width.prunable) == (True, False)
    assert width.kind != "expert"
    wanted = "read for its values alone" if "top-k" in case else "a missing unit is not the same as zero"
    assert wanted in width.reason


def test_units_chosen_by_number_are_experts_still():
    chosen = Winners(lambda x: x * torch.zeros_like(x).scatter(-1, x.topk(9, -1).indices, 1.0)).double()
    (width,) = [group for group in certified(chosen).values() if group.size == 20]
    assert (width.kind, width.prunable, width.minimum) == ("expert", True, 9)


@pytest.mark.parametrize("positions", [False, True])
def test_msort_orders_the_first_axis(positions):
    """The first axis of what is sorted is the batch; transposed, it is the units."""
    sort = (lambda x: x.t().msort().t()) if positions else torch.msort
    groups = node_groups(trace(Winners(sort).double(), INPUTS))
    (width, *_) = [group for group in groups.values() if group.size == 20]
    assert width.prunable is not positions


def test_the_slopes_of_prelu_lie_along_the_second_axis():
    """Nine channels at nine positions: the slopes are coupled with the first nine alone."""

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.slope, self.down = nn.Linear(6, 9), nn.PReLU(9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            spread = self.up(x).unsqueeze(-1) * torch.arange(9).double().sub(4)
            return self.down(self.slope(spread).sum(-1))

    (width,) = [group for group in certified(Channels().double()).values() if group.prunable]
    assert {member.parameter for member in width.members} == {
        "up.weight",
        "up.bias",
        "slope.weight",
        "down.weight",
    }
