"""Sizes and selections written into a traced graph, so that it runs on sliced or renumbered weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import fx

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.shrink.program import Program
from graphprune.shrink.resizers import resizer_for
from graphprune.shrink.sizes import Sizes


def resize(program: Program, groups: NodeGroups, kept: Mapping[str, Indices]) -> Program:
    """Return a program that computes the same function on weights of which only some units are kept.

    Exact by construction: a mean keeps the divisor that it had, attention keeps its scale, and what is computed
    without parameters (rotary angles, masks) is read through a selection of its own by each operator.

    Args:
        program: Of the graph that `groups` were read off; it is not changed.
        groups: The node groups.
        kept: Units that stay, in their new order, by group name.
    """
    twin = copy.copy(program)
    twin.module = copy.deepcopy(program.module)
    resize_graph(twin.module, groups, kept, program.weight_names)
    return twin


def resize_graph(
    module: fx.GraphModule, groups: NodeGroups, kept: Mapping[str, Indices], weight_names: Mapping[str, str]
) -> None:
    """Rewrite a traced graph in place.

    Args:
        module: What was traced.
        groups: Its node groups.
        kept: Units that stay, in their new order, by group name.
        weight_names: Qualified names of weights by the name of the node that stands for them.
    """
    sizes = Sizes(module, groups, groups.selection(kept), weight_names)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        resizer = resizer_for(str(node.target))
        if resizer is not None:
            resizer(sizes, node)
        sizes.select_operands(node)
    module.graph.eliminate_dead_code()  # what was traced for nothing has no layouts, and keeps its old sizes
    module.graph.lint()
    module.recompile()
