"""What holds of the node groups of every network, stated on generated ones.

Weights are permuted and zeroed here index by index, from what a group says it owns, and the network's own module is
run on them: neither `certify` nor `shrink` has a part in it but where they are what is tested.
"""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
import torch
from brute_force import Search, TooManyBranchesError
from brute_force_operators import rows_of
from examined_networks import Examined, change, distance, examine, over_networks, run, units_of
from generated_networks import build, inputs_of

from graphprune.certify.certificate import certify
from graphprune.coupling import analysis
from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.coupling.node_group import NodeGroup
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.shrink.program import Program
from graphprune.shrink.resize import resize
from graphprune.shrink.weights import select_weight
from graphprune.trace.model import trace

TOLERANCE = 1e-9


@over_networks()
def test_each_index_belongs_to_one_unit_of_each_group(network):
    """Its units share no index, and own as many each as the member says."""
    examined = examine(network)
    for group in examined.movable:
        for member in group.members:
            owned = np.concatenate([group.indices(member, unit) for unit in range(group.size)])
            owner = group.owner(member)
            assert len(set(owned.tolist())) == len(owned) == member.indices_per_unit * group.size
            assert sorted(owned.tolist()) == np.flatnonzero(owner >= 0).tolist()
            assert (
                np.bincount(owner[owner >= 0], minlength=group.size).tolist()
                == [member.indices_per_unit] * group.size
            )


@over_networks()
def test_an_index_stays_exactly_if_all_units_that_own_it_stay(network):
    """The groups that span an axis form a grid: no index is forgotten, none is taken twice."""
    examined = examine(network)
    groups, generator = examined.groups, examined.generator()
    kept = {group.name: np.flatnonzero(generator.random(group.size) < 0.7) for group in examined.movable}
    selection = groups.selection(kept)
    owners: dict[tuple[str, int], list[np.ndarray]] = {}
    for group in examined.movable:
        for member in [member for member in group.members if member.side != "selected"]:
            owner = group.owner(member)
            stays = (owner < 0) | np.isin(owner, kept[group.name])
            owners.setdefault((member.parameter, member.axis), []).append(stays)
    for (parameter, axis), stays in owners.items():
        layout = groups.axes(parameter)[axis]
        assert groups.keep(layout, selection).tolist() == np.flatnonzero(np.all(stays, axis=0)).tolist()


@over_networks()
def test_together_groups_tell_every_index_from_every_other(network):
    """Two indices with the same owners in all groups are repetitions inside one unit; no index is without owner."""
    examined = examine(network)
    owners: dict[tuple[str, int], list[np.ndarray]] = {}
    for group in examined.groups.values():
        for member in group.members:
            owners.setdefault((member.parameter, member.axis), []).append(group.owner(member))
    for found in owners.values():
        places = Counter(tuple(place) for place in np.stack(found).T.tolist())
        for place, times in places.items():
            if max(place) < 0:
                continue  # segments of one index each, which no group has: there is nothing to tell apart
            shared = [owner for owner, unit in zip(found, place, strict=True) if unit >= 0]
            sizes = [Counter(owner[owner >= 0].tolist()).most_common(1)[0][1] for owner in shared]
            assert times <= min(sizes)


@over_networks()
def test_renumbered_units_leave_the_function_as_it_is(network):
    """In the network's own module; without rotary pairs, whose angles the module computes in its own order."""
    examined = examine(network)
    generator = examined.generator()
    turned = any(getattr(node.block, "turned", 0) for node in network.nodes)
    movable = [group for group in examined.movable if not (turned and group.kind == "head_dim")]
    order = {group.name: generator.permutation(group.size) for group in movable}

    def permuted(group: NodeGroup, member, tensor, owner):
        index = np.arange(len(owner))
        for unit in range(group.size):
            index[owner == unit] = np.flatnonzero(owner == order[group.name][unit])
        return tensor.index_select(member.axis, torch.as_tensor(index))

    weights = change(examined, movable, permuted)
    assert distance(run(examined, weights), run(examined, examined.weights)) < TOLERANCE


@over_networks()
def test_certificates_hold(network):
    """All at once and at random: renumbering moves nothing, removing is zeroing."""
    examined = examine(network)
    if not examined.movable:
        return
    certificate = certify(examined.model, examined.groups, examined.inputs, seed=network.seed)
    assert certificate.permuted_max_error < TOLERANCE
    assert certificate.removed_max_error < TOLERANCE
    assert certificate.failures == ()


@over_networks(share=2)
def test_no_part_of_a_unit_can_be_removed_alone(network):
    """From what a unit owns of any one parameter's axis, all that it owns follows by shapes alone.

    The clauses of the brute-force search say what must go with what; their smallest solution is the unit itself.
    """
    examined = examine(network)
    generator = examined.generator()
    rows = rows_of(examined.groups.graph.program, examined.weights_by_identity)
    search = Search(rows)
    for position in generator.permutation(len(examined.prunable))[:3]:
        group = examined.prunable[position]
        unit = int(generator.integers(group.size))
        members = [member for member in group.members if member.role == "parameter"]
        owned = [{(m.parameter, m.axis, int(index)) for index in group.indices(m, unit)} for m in members]
        part, whole = owned[int(generator.integers(len(owned)))], frozenset().union(*owned)
        try:
            smallest = search.smallest(part)
        except TooManyBranchesError:  # weights that many layers share leave too many choices to follow
            continue
        assert smallest == [whole]


def random_plan(examined: Examined, generator: np.random.Generator, groups: NodeGroups) -> Plan:
    """Remove some units of some groups."""
    removed = {
        group.name: generator.permutation(group.size)[
            : int(generator.integers(0, group.size // 2 + 1))
        ].tolist()
        for group in groups.values()
        if group.prunable and generator.random() < 0.6
    }
    return Plan(removed)


@over_networks()
def test_removed_units_are_zeroed_units(network):
    """The network's own module with zeros in all that some units own, against the graph without them."""
    examined = examine(network)
    plan = random_plan(examined, examined.generator(), examined.groups)
    kept = plan.kept(examined.groups)

    def zeroed(group: NodeGroup, member, tensor, owner):
        gone = np.flatnonzero(np.isin(owner, plan[group.name]))
        return (
            tensor.index_fill(member.axis, torch.as_tensor(gone), 0) if member.role == "parameter" else tensor
        )

    weights = change(examined, [examined.groups[name] for name in plan], zeroed)
    cut = {
        name: select_weight(name, tensor, examined.groups, kept) for name, tensor in examined.weights.items()
    }
    smaller = resize(Program(examined.groups.graph.program), examined.groups, kept)
    assert distance(smaller(cut, examined.inputs)[0], run(examined, weights)) < TOLERANCE


@over_networks(share=2)
def test_plans_compose(network):
    """One plan after another is both at once, on a model that was analyzed anew in between."""
    examined = examine(network)
    generator = examined.generator()
    first = random_plan(examined, generator, examined.groups)
    # The graph cuts a smaller width where its segments end by now, a module's own code where they ended before.
    once = shrink(examined.model, examined.groups, first, examined.inputs, form="graph")
    groups = node_groups(trace(once, examined.inputs, dynamic=False))
    second = random_plan(examined, generator, groups)
    left = {name: group.size - len(first.get(name, ())) for name, group in examined.groups.items()}
    alike = Counter(name.partition("#")[0] for name in examined.groups)
    if any(alike[name.partition("#")[0]] > 1 and left[name] == 1 for name in first):
        # An axis within a width that was cut to one unit is none any more, and those of its name are numbered anew.
        return
    assert all(groups[name].size == left[name] for name in second)
    twice = shrink(once, groups, second, examined.inputs, form="graph")
    both = first.then(second, examined.groups)
    at_once = shrink(examined.model, examined.groups, both, examined.inputs, form="graph")
    weights, expected = dict(twice.named_parameters()), dict(at_once.named_parameters())
    assert weights.keys() == expected.keys()
    for name in weights:
        # A norm's weight takes over what its divisor loses: sqrt(5/6) sqrt(3/5) is sqrt(3/6) but for rounding.
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-15, atol=0)
    assert distance(twice(**examined.inputs), at_once(**examined.inputs)) < TOLERANCE


@over_networks()
def test_a_plan_that_keeps_all_changes_nothing(network):
    """Not a bit of the outputs, nor of the weights."""
    examined = examine(network)
    same = shrink(examined.model, examined.groups, Plan({}), examined.inputs)
    assert torch.equal(same(**examined.inputs), examined.model(**examined.inputs))
    before = examined.model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in same.state_dict().items())


def table(groups: NodeGroups, renamed=lambda name: name) -> list[tuple]:
    """Return what groups are, without the order and the names that depend on modules' names."""
    return sorted(
        (
            group.kind,
            group.size,
            group.permutable,
            group.prunable,
            sorted(
                (renamed(m.parameter), m.axis, m.side, m.shape, m.indices_per_unit, m.role)
                for m in group.members
            ),
        )
        for group in groups.values()
    )


@over_networks(share=2)
def test_names_of_modules_and_sizes_of_inputs_mean_nothing(network):
    """Not even where a size of the batch or the sequence happens to be the size of something else."""
    examined = examine(network)
    other = build(network, "attention{}_lora_norm".format)
    groups = node_groups(trace(other, inputs_of(network, batch=3, length=6), dynamic=False))

    def renamed(name: str) -> str:
        first, *rest = name.split(".")
        return ".".join([first.replace("attention", "node").replace("_lora_norm", ""), *rest])

    assert table(groups, renamed) == table(examined.groups)


@over_networks()
def test_an_operator_without_a_rule_only_pins(network):
    """Whichever operator loses its rule: what can still be pruned could be pruned before, and is certified."""
    examined = examine(network)
    targets = sorted({operator.target for operator in examined.groups.graph.operators})
    unknown = targets[int(examined.generator().integers(len(targets)))]
    real = analysis.rule_for
    with mock.patch.object(analysis, "rule_for", lambda target: None if target == unknown else real(target)):
        groups = node_groups(examined.groups.graph)
    before = units_of(examined.groups, lambda group: group.prunable)
    after = units_of(groups, lambda group: group.prunable)
    assert set(after) <= set(before), unknown
    if any(group.permutable for group in groups.values()):
        certificate = certify(examined.model, groups, examined.inputs, seed=network.seed)
        assert certificate.permuted_max_error < TOLERANCE
        assert certificate.removed_max_error < TOLERANCE
