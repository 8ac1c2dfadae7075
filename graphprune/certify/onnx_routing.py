"""What zeroing means in an ONNX graph for units that are chosen from: a unit that is gone cannot be chosen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.trace.onnx import named_nodes

_CHOOSING = {"onnx.Softmax", "onnx.LogSoftmax", "onnx.TopK"}


def forbid_choices(model: ir.Model, groups: NodeGroups, kept: Mapping[str, Indices]) -> None:
    """Give units that are not kept minus infinity as their score, in place.

    A router's softmax and top-k see every expert; zero weights alone would leave an expert a score of zero.

    Args:
        model: A copy of the graph that `groups` were read off.
        groups: The node groups.
        kept: Units that stay, by group name.
    """
    selection = groups.selection(kept)
    targets = {operator.name: operator.target for operator in groups.graph.operators}
    for name, node in list(named_nodes(model.graph)):
        source = node.inputs[0] if node.inputs else None
        if source is None or targets.get(name) not in _CHOOSING:
            continue
        axes = groups.read(name).get(source.name or "") or groups.axes(source.name or "")
        axis = node.attributes.get_int("axis", -1)
        if not axes or len(left := groups.keep(axes[axis], selection)) == axes[axis].size:
            continue
        _forbid(model.graph, node, np.isin(np.arange(axes[axis].size), left), axis % len(axes), len(axes))


def _forbid(graph: ir.Graph, node: ir.Node, left: NDArray[np.bool_], axis: int, rank: int) -> None:
    """Add minus infinity in front of a node, but for the indices that are left of an axis."""
    (source,) = node.inputs[:1]
    if source is None:
        return
    dtype = np.float32 if source.dtype is None else source.dtype.numpy()
    shape = [1] * rank
    shape[axis] = -1
    scores = np.where(left, 0, -np.inf).astype(dtype).reshape(shape)
    added = ir.val(f"{node.outputs[0].name}.forbidden", const_value=ir.tensor(scores))
    graph.register_initializer(added)
    total = ir.node("Add", [source, added])
    graph.insert_before(node, total)
    node.replace_input_with(0, total.outputs[0])
