"""Which groups are found: golden tables, partition, reasons."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, traced
from torch import nn

from graphprune.certify.certificate import certify
from graphprune.coupling.groups import node_groups
from graphprune.coupling.rules import rule
from graphprune.errors import CouplingError
from graphprune.trace.model import trace

HEAD_DIM = HIDDEN // HEADS


def table(groups):
    return Counter((g.kind, g.size, len(g.members), g.prunable) for g in groups.values())


def test_golden_table_of_a_grouped_query_llama(llama):
    assert table(llama.groups) == {
        ("vocabulary", VOCABULARY, 1, False): 1,
        ("hidden", HIDDEN, 1 + 7 * LAYERS + 2 * LAYERS + 1, True): 1,
        ("attention_heads", KV_HEADS, 4, True): LAYERS,
        ("query_heads", HEADS // KV_HEADS, 2, True): LAYERS,
        ("head_dim", HEAD_DIM // 2, 3, True): LAYERS,  # rotary pairs, with the frequencies
        ("head_dim", HEAD_DIM, 2, True): LAYERS,  # what values and outputs share
        ("ffn", FFN, 3, True): LAYERS,
    }


def test_golden_table_with_adapters(adapted):
    assert table(adapted.groups) == {
        ("vocabulary", VOCABULARY, 1, False): 1,
        ("hidden", HIDDEN, 1 + 14 * LAYERS + 2 * LAYERS + 1, True): 1,
        ("attention_heads", KV_HEADS, 8, True): LAYERS,
        ("query_heads", HEADS // KV_HEADS, 4, True): LAYERS,
        ("head_dim", HEAD_DIM // 2, 5, True): LAYERS,
        ("head_dim", HEAD_DIM, 4, True): LAYERS,
        ("ffn", FFN, 6, True): LAYERS,
        ("lora_rank", 4, 2, True): 7 * LAYERS,
    }


def test_a_key_head_takes_its_query_heads_along(llama):
    group = llama.groups[llama.of_kind("attention_heads")[0]]
    by_name = {member.parameter.split(".")[-2]: member for member in group.members}
    assert set(by_name) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    rows = HEADS // KV_HEADS * HEAD_DIM
    assert group.indices(by_name["q_proj"], 1).tolist() == list(range(rows, 2 * rows))
    assert group.indices(by_name["k_proj"], 1).tolist() == list(range(HEAD_DIM, 2 * HEAD_DIM))
    assert (by_name["o_proj"].axis, by_name["o_proj"].side) == (1, "consumes")


def test_parameters_per_unit_are_what_removing_one_frees(llama):
    ffn = llama.groups[llama.of_kind("ffn")[0]]
    assert ffn.parameters_per_unit == 3 * HIDDEN
    heads = llama.groups[llama.of_kind("attention_heads")[0]]
    assert heads.parameters_per_unit == (2 * HEADS // KV_HEADS + 2) * HEAD_DIM * HIDDEN


def test_each_index_of_an_axis_has_one_owner_in_each_group_that_spans_it(adapted):
    """Groups on one axis form a grid: together their owners tell every index from every other."""
    owners = {}
    for group in adapted.groups.values():
        for member in group.members:
            owner = group.owner(member)
            counts = np.bincount(owner[owner >= 0], minlength=group.size)
            assert (counts == member.indices_per_unit).all()
            owners.setdefault((member.parameter, member.axis), []).append(owner)
    for (parameter, axis), found in owners.items():
        size = adapted.groups.graph.weights[parameter].shape[axis]
        halves = 2 if len({tuple(index) for index in np.stack(found).T}) * 2 == size else 1  # rotary halves
        assert len({tuple(index) for index in np.stack(found).T}) * halves == size


def test_groups_are_the_same_each_time(llama):
    again = traced(llama.model)
    assert list(again.groups) == list(llama.groups)
    assert again.groups.rows() == llama.groups.rows()


@pytest.mark.parametrize(
    ("first", "second", "operators"),
    [
        ("mlp.gate_proj.weight:0", "mlp.down_proj.weight:1", ["mul", "linear"]),
        ("self_attn.v_proj.weight:0", "self_attn.o_proj.weight:1", ["view", "reshape", "linear"]),
    ],
)
def test_why_names_the_operators_between_two_axes(llama, first, second, operators):
    layer = "model.layers.0."
    path = llama.groups.why(layer + first, layer + second)
    found = [operator.target.split(".")[1] for operator in path]
    assert path
    assert {operator.module.split(".")[2] for operator in path if operator.module.count(".") > 2} == {"0"}
    assert found == operators


def test_why_of_what_nothing_couples_says_so(llama):
    with pytest.raises(CouplingError, match="nothing couples"):
        llama.groups.why("model.layers.0.mlp.gate_proj.weight:0", "model.layers.1.mlp.gate_proj.weight:0")
    with pytest.raises(CouplingError, match=r"there is no axis 'model\.nothing:0'"):
        llama.groups.why("model.nothing:0", "model.layers.1.mlp.gate_proj.weight:0")


def test_the_coupling_graph_connects_the_members_of_each_group_and_names_operators(llama):
    names = {operator.name for operator in llama.groups.graph.operators}
    for group in llama.groups.values():
        of_group = llama.groups.operators_of(group)
        assert all(operator.name in names for operator in of_group)
        first, *rest = [m for m in group.members if m.side != "selected"]
        for member in rest:
            path = llama.groups.why(f"{first.parameter}:{first.axis}", f"{member.parameter}:{member.axis}")
            assert path or (first.parameter == member.parameter)
    assert all(data["operator"] in names | {""} for _, _, data in llama.groups.coupling.edges(data=True))


def test_an_unknown_group_is_named(llama):
    with pytest.raises(CouplingError, match="no node group 'nonsense'"):
        llama.groups["nonsense"]


class Norm(nn.Module):
    """A residual stream under LayerNorm, and an operator that has no rule."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.down, self.last = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.opaque = opaque

    def forward(self, x):
        x = self.first(x)
        y = torch.relu(self.up(self.norm(x)))
        if self.opaque:
            y = torch.special.i0(y)
        return self.last(x + self.down(y))


def groups_of(model: nn.Module):
    return node_groups(trace(model, {"x": torch.zeros(3, 5)}))


def test_layer_norm_may_be_renumbered_but_not_cut():
    hidden = next(g for g in groups_of(Norm(opaque=False)).values() if g.kind == "hidden")
    assert (hidden.size, hidden.permutable, hidden.prunable) == (8, True, False)
    assert "LayerNorm" in hidden.reason


class InstanceNorm(nn.Module):
    """A waist whose units are the channels of an InstanceNorm, or the positions that it runs over."""

    def __init__(self, channels: bool) -> None:
        super().__init__()
        self.channels = channels
        self.up, self.down = nn.Linear(5, 9), nn.Linear(9, 3)
        self.norm = nn.InstanceNorm1d(9 if channels else 7, affine=channels)

    def forward(self, x):
        y = torch.relu(self.up(x))
        return self.down(self.norm(y.transpose(1, 2)).transpose(1, 2) if self.channels else self.norm(y))


@pytest.mark.parametrize("channels", [True, False])
def test_instance_norm_may_lose_channels_but_no_positions(channels):
    torch.manual_seed(0)
    model, inputs = InstanceNorm(channels).double().eval(), {"x": torch.randn(2, 7, 5).double()}
    groups = node_groups(trace(model, inputs, dynamic=False))
    (waist,) = [group for group in groups.values() if group.size == 9]
    assert (waist.permutable, waist.prunable) == (True, channels)
    assert (waist.kind == "hidden") is channels
    assert certify(model, groups, inputs).failures == ()


def test_what_an_operator_without_a_rule_touches_is_unprunable_by_its_name():
    groups = groups_of(Norm(opaque=True))
    width = next(g for g in groups.values() if g.size == 12 and len(g.members) == 2)
    assert not width.permutable
    assert width.reason == "operator aten.special_i0.default has no rule"
    assert not any(group.prunable for group in groups.values())


def test_inputs_and_outputs_are_reasons():
    reasons = {g.size: g.reason for g in groups_of(Norm(opaque=False)).values()}
    assert reasons[5] == "reaches the model's input 'x' axis 1"
    assert reasons[3].startswith("reaches the model's output")


class Concatenated(nn.Module):
    """Two widths that reach the output, and only as one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(5, 6)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], -1)


def test_what_is_said_of_a_composed_axis_holds_for_its_parts():
    groups = groups_of(Concatenated())
    parts = [group for group in groups.values() if group.size in (4, 6)]
    assert len(parts) == 2
    assert all(group.reason.startswith("reaches the model's output") for group in parts)
    assert not any(group.permutable for group in parts)


def test_a_second_rule_for_an_operator_is_refused():
    groups_of(Norm(opaque=False))  # loads the built-in rules
    with pytest.raises(CouplingError, match=r"aten\.linear already has a rule"):
        rule("aten.linear")(lambda operator, algebra: [])


def test_analysis_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import graphprune.coupling.groups, sys; print({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


class Branches(nn.Module):
    """A weight for each of three branches, which are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.branches = nn.Linear(5, 3), nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def forward(self, x):
        stacked = torch.stack([branch(x) for branch in self.branches], -1)
        return (stacked * torch.sigmoid(self.route(x)).unsqueeze(-2)).sum(-1)


def test_an_axis_whose_indices_stand_for_themselves_is_told_too():
    (group,) = [
        group
        for group in groups_of(Branches()).values()
        if any((m.parameter, m.axis) == ("route.weight", 0) for m in group.members)
    ]
    assert (group.size, group.permutable, group.prunable) == (3, False, False)
    assert group.reason == "each of its indices is read for itself"
    assert [group.indices(member, 2).tolist() for member in group.members] == [[2], [2]]
