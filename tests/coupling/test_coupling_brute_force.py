"""The engine's units against those that a search over single indices finds."""

from __future__ import annotations

import brute_force
import numpy as np
import pytest
from brute_force_rows import Slice
from examined_networks import Examined, Units, examine, units_of
from generated_attention import Attention
from generated_blocks import Activation, Convolution, Cut, Gated, Ladder, Linear, Norm, Rearranged
from generated_networks import Network, Node
from hypothesis import HealthCheck, given, reject, settings
from network_strategies import SMALL_WIDTHS, networks

# Where the engine may say less than the search: it has no rule, or layouts of which only some indices fit together.
REASONS_TO_KEEP = ("has no rule", "no common refinement")


def search(examined: Examined) -> tuple[set[frozenset[Slice]], set[frozenset[Slice]]]:
    """Return the removable units that the search finds, and all that it finds."""
    tied, groups = examined.groups.graph.tied, examined.groups
    units = brute_force.units_of(groups.graph.program, dict(examined.weights_by_identity), examined.inputs)
    named = {
        unit: frozenset((tied.get(name, name), axis, index) for name, axis, index in unit.slices)
        for unit in units
    }
    return {slices for unit, slices in named.items() if unit.removable}, set(named.values())


def reasons(examined: Examined, slices: frozenset[Slice]) -> set[str | None]:
    """Return why the groups that own any of `slices` keep them."""
    groups = examined.groups
    return {
        group.reason
        for group in groups.values()
        for member in group.members
        for name, axis, index in slices
        if (member.parameter, member.axis) == (name, axis) and group.owner(member)[index] >= 0
    }


def is_the_only_one(examined: Examined, slices: frozenset[Slice]) -> bool:
    """Whether a unit is a segment of one index: a group of one unit, which never loses it."""
    groups = examined.groups
    places = {(name, axis): groups.segments(groups.axes(name)[axis]) for name, axis, _ in slices}
    starts = {place: np.cumsum([0, *(segment.size for segment in found)]) for place, found in places.items()}
    return all(
        places[name, axis][int(np.searchsorted(starts[name, axis], index, side="right")) - 1].size == 1
        for name, axis, index in slices
    )


def unexplained(examined: Examined, lost: set[frozenset[Slice]]) -> list[list[Slice]]:
    return [
        sorted(slices)
        for slices in lost
        if not is_the_only_one(examined, slices)
        and not any(why in str(reason) for reason in reasons(examined, slices) for why in REASONS_TO_KEEP)
    ]


def described(units: Units, wrong: set[frozenset[Slice]]) -> list[tuple[str, list[Slice]]]:
    return [(units[slices], sorted(slices)) for slices in wrong]


def agree(network: Network) -> Examined:
    """Compare both ways: nothing wrong, and nothing lost without a reason that is known."""
    examined = examine(network)
    removable, tradable = search(examined)
    prunable = units_of(examined.groups, lambda group: group.prunable)
    movable = units_of(examined.groups, lambda group: group.permutable)
    assert described(prunable, set(prunable) - removable) == []
    assert described(movable, set(movable) - tradable) == []
    assert unexplained(examined, removable - set(prunable)) == []
    assert unexplained(examined, tradable - set(movable)) == []
    return examined


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(most_nodes=3, widths=SMALL_WIDTHS))
def test_units_are_those_of_a_brute_force_search(network):
    try:
        agree(network)
    except brute_force.TooManyBranchesError:
        reject()


def network_of(*blocks, residual: bool = True, merge: str = "first") -> Network:
    nodes = tuple(Node((position,), merge, block, residual) for position, block in enumerate(blocks))
    return Network(True, False, 8, nodes, 5, 1)


def attention(**changes) -> Attention:
    plain = {
        "key_heads": 2,
        "repeat": 1,
        "width": 4,
        "value_width": 4,
        "fusion": "separate",
        "turn": "none",
        "attend": "operator",
        "causal": True,
        "normed": False,
        "bias": True,
    }
    return Attention(**{**plain, **changes})


CASES = {
    "plain attention": (attention(value_width=3), {2: 1, 4: 1, 3: 1, 8: 1}),
    "grouped queries": (attention(repeat=3, value_width=3), {2: 1, 3: 2, 4: 1, 8: 1}),
    "queries grouped by the operator": (
        attention(repeat=3, value_width=3, attend="grouped"),
        {2: 1, 3: 2, 4: 1, 8: 1},
    ),
    "rotary halves": (attention(turn="halves", width=6), {2: 1, 3: 1, 4: 1, 8: 1}),
    "rotary pairs": (attention(turn="pairs", width=6), {2: 1, 3: 1, 4: 1, 8: 1}),
    "[q | k | v]": (attention(fusion="stacked", value_width=3, attend="written"), {2: 1, 4: 1, 3: 1, 8: 1}),
    "(heads, q + k + v)": (attention(fusion="per_head", value_width=3), {2: 1, 4: 1, 3: 1, 8: 1}),
    "(3, heads, width)": (attention(fusion="unbound"), {2: 1, 4: 1, 8: 1}),
    "(key heads, repeat + 2, width)": (attention(fusion="per_group", repeat=3), {2: 1, 3: 1, 4: 1, 8: 1}),
    "gated": (Gated(6, "chunk", True), {6: 1, 8: 1}),
    "low rank": (Linear(8, True, False, (3, 4)), {3: 1, 4: 1, 8: 1}),
    "written RMSNorm": (Norm("written rms"), {8: 1}),
    "fused RMSNorm": (Norm("rms"), {8: 1}),
    "LayerNorm": (Norm("layer"), {}),
    "written LayerNorm": (Norm("written layer"), {}),
    "GroupNorm": (Norm("group", 4), {4: 1}),
    "BatchNorm": (Norm("batch"), {8: 1}),
    "grouped convolution": (Convolution(8, 2, 3), {2: 1, 4: 1}),
    "depth-wise convolution": (Convolution(8, 8, 3), {8: 1}),
    "U-Net": (Ladder((3, 6)), {3: 1, 6: 1, 7: 1, 8: 1}),
    "swapped pieces": (Cut((3, 5), (1, 0), False), {}),
    "scaled factors": (Rearranged((2, 4), (0, 1), (True, True)), {2: 1, 4: 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_units_of_well_known_blocks(case):
    """On a residual stream of 8; sizes of prunable groups, and how many there are of each."""
    block, expected = CASES[case]
    examined = agree(network_of(block))
    found: dict[int, int] = {}
    for group in examined.prunable:
        found[group.size] = found.get(group.size, 0) + 1
    assert found == expected


def test_what_one_norm_scales_to_zero_another_may_sum_over():
    """BatchNorm with a weight and a bias of zero makes its channel zero, whatever its mean was."""
    nodes = (Node((0,), "first", Norm("batch"), False), Node((1,), "first", Norm("rms"), False))
    examined = agree(Network(False, False, 6, nodes, 5, 0))
    assert 6 in {group.size for group in examined.prunable}


def test_a_segment_of_one_index_is_a_group_that_never_loses_it():
    cut = Cut((2, 3, 7), (1,), True)
    nodes = (Node((0,), "first", Activation("relu"), False), Node((1, 0), "concat", cut, False))
    examined = agree(Network(False, False, 6, nodes, 5, 0))
    assert sorted(group.size for group in examined.prunable) == [2, 3]
