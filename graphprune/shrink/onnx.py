"""Surgery on an ONNX graph: a smaller model, made of the file itself; no module is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.errors import CouplingError
from graphprune.shrink.onnx_resize import OnnxSizes
from graphprune.shrink.onnx_resizers import resize_node
from graphprune.shrink.onnx_weights import cut_weights
from graphprune.trace.onnx import named_nodes, open_onnx, subgraph_values


def fitting_model(model: object, groups: NodeGroups) -> ir.Model:
    """Return the ONNX model whose weights are meant.

    Args:
        model: The path of a file, a model in memory, or None for the one that the groups were read off.
        groups: Node groups of an ONNX graph.

    Raises:
        CouplingError: If it is no ONNX model, or another one.
        TraceError: If there is no such file.
    """
    program: ir.Model = groups.graph.program
    if model is None or model is program:
        return program
    if not isinstance(model, (str, Path, ir.Model)):
        raise CouplingError(
            f"the node groups are those of an ONNX model, which a {type(model).__name__} is not",
            "give the path of the .onnx file, the onnx_ir.Model, or None",
        )
    opened = open_onnx(model)
    for one, other in zip_longest(_outline(opened), _outline(program)):
        if one != other:
            raise CouplingError(
                f"the node groups are of another model: it has {_told(other)} where this one has {_told(one)}",
                "trace this very model, and take its groups",
            )
    return opened


def _outline(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Yield the names of nodes and initializers, and what they are."""
    yield from ((name, f"an operator {node.op_type}") for name, node in named_nodes(model.graph))
    for name, value in model.graph.initializers.items():
        yield name, f"a weight of shape {list(value.shape or ())}"


def _told(item: tuple[str, str] | None) -> str:
    return f"'{item[0]}', {item[1]}," if item else "nothing"


def shrink_onnx(model: ir.Model, groups: NodeGroups, kept: Mapping[str, Indices]) -> ir.Model:
    """Return an ONNX model with some units only.

    Exact by construction: a mean keeps the divisor that it had, attention keeps its scale, and what is computed
    without parameters (rotary angles, masks) is read through a selection of its own by each operator. Weights that
    lose nothing stay where they are, in the file's external data for one; the others are held in memory.

    Args:
        model: The model; it is not changed.
        groups: Its node groups.
        kept: Units that stay, in their new order, by group name.

    Raises:
        ShrinkError: If an operator cannot be told of the new sizes; it is named.
    """
    small = model.clone()
    cut_weights(small, groups, kept)
    sizes = OnnxSizes(small, groups, kept)
    operators = {operator.name: operator for operator in groups.graph.operators}
    for name, node in list(named_nodes(small.graph)):
        operator = operators.get(name)
        if operator is not None:
            _check_subgraphs(sizes, node)
            resize_node(sizes, node, operator.target)
        sizes.infer(node, operator)
    _declare_shapes(small.graph, sizes)
    return RemoveUnusedNodesPass()(small).model


def _check_subgraphs(sizes: OnnxSizes, node: ir.Node) -> None:
    for value in subgraph_values(node):
        if not np.array_equal(sizes.numbers_before(value), sizes.numbers_now(value)):  # type: ignore[arg-type]
            raise sizes.refused(node, f"its subgraph reads '{value.name}', a size that changes")


def _declare_shapes(graph: ir.Graph, sizes: OnnxSizes) -> None:
    """Write down the new sizes wherever the file tells a value's shape, that of inputs and outputs included."""
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is None or value.name in graph.initializers:
            continue
        before, now = sizes.shape_before(value), sizes.shape_now(value)
        if len(before) == len(now) == len(value.shape):
            dims = zip(value.shape, before, now)
            value.shape = ir.Shape(
                [dim if old == new else new if isinstance(dim, int) else None for dim, old, new in dims]
            )
        else:
            value.shape = None
