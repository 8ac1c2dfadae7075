"""What zeroing means for units that are chosen from: a unit that is gone cannot be chosen."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import fx

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.shrink.node_arguments import argument
from graphprune.shrink.program import Program
from graphprune.shrink.sizes import Sizes

_CHOOSING = ("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.topk")


def forbid_choices(program: Program, groups: NodeGroups, kept: Mapping[str, Indices]) -> Program:
    """Return a program in which units that are not kept have minus infinity as their score.

    A router's softmax and top-k see every expert; zero weights alone would leave an expert a score of zero.

    Args:
        program: Of the graph that `groups` were read off; it is not changed.
        groups: The node groups.
        kept: Units that stay, by group name.
    """
    twin = copy.copy(program)
    twin.module = copy.deepcopy(program.module)
    sizes = Sizes(twin.module, groups, groups.selection(kept), twin.weight_names)
    for node in list(twin.module.graph.nodes):
        if node.op == "call_function" and str(node.target).rsplit(".", 1)[0] in _CHOOSING:
            _forbid(sizes, node)
    twin.module.recompile()
    return twin


def _forbid(sizes: Sizes, node: fx.Node) -> None:
    source, dim = node.args[0], argument(node, "dim")
    axes = sizes.axes(source, reader=node)
    if not isinstance(source, fx.Node) or not axes or not sizes.touches(axes[dim]):
        return
    axis, graph = axes[dim], node.graph
    gone = torch.ones(axis.size, dtype=torch.bool)
    gone[torch.as_tensor(sizes.kept(axis))] = False
    shape = [1] * len(axes)
    shape[dim] = -1
    with graph.inserting_before(node):
        score = graph.call_function(
            torch.ops.aten.masked_fill.Scalar,
            (source, sizes.constant(gone.view(shape).numpy(), source), -torch.inf),
        )
    node.replace_input_with(source, score)
