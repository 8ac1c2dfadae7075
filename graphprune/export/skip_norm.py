"""A residual sum and the norm behind it as the one operator that ONNX Runtime has for both."""

from __future__ import annotations

import onnx_ir as ir

from graphprune.export.graph_writer import MICROSOFT

_SUM = 3  # the output that holds the sum


def fuse_skip_norms(graph: ir.Graph) -> None:
    """Put SkipSimplifiedLayerNormalization for every sum that RMSNormalization reads, while shapes are known."""
    for norm in [node for node in graph if node.op_type == "RMSNormalization" and node.domain == ""]:
        addition = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if (
            addition is not None
            and addition.op_type == "Add"
            and addition.domain == ""
            and _fits(addition, norm)
        ):
            _fuse(graph, addition, norm)


def _fits(addition: ir.Node, norm: ir.Node) -> bool:
    """Return whether nothing is broadcast, and the last axis is what is normed."""
    left, right = (value.shape if value is not None else None for value in addition.inputs)
    gain = norm.inputs[1]
    if left is None or right is None or gain is None or gain.shape is None:
        return False
    axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
    known = ir.SymbolicDim(None) not in left
    return known and left == right and len(left) == 3 and list(gain.shape) == [left[2]] and axis in (-1, 2)


def _fuse(graph: ir.Graph, addition: ir.Node, norm: ir.Node) -> None:
    """Compute sum and norm where the sum was."""
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*addition.inputs, norm.inputs[1]],
        {"epsilon": epsilon},
        domain=MICROSOFT,
        num_outputs=_SUM + 1,
        name=norm.name,
    )
    fused.outputs[1].name = fused.outputs[2].name = ""
    ir.convenience.replace_nodes_and_values(
        graph,
        insertion_point=addition,
        old_nodes=[norm, addition],
        new_nodes=[fused],
        old_values=[addition.outputs[0], norm.outputs[0]],
        new_values=[fused.outputs[_SUM], fused.outputs[0]],
    )
