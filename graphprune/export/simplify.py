"""From the tracer's graph to a small, readable one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import Sequential, common
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions

from graphprune.export.attention import fuse_attention

# Only shapes and other small things are folded: what is larger is data, and keeps its name.
_LARGEST_FOLDED = 1024


def simplify(model: ir.Model) -> None:
    """Fold constants and fuse operators (RMSNormalization, RotaryEmbedding, Attention) while shapes are known."""
    optimizer.optimize_ir(
        model, onnx_shape_inference=False, input_size_limit=_LARGEST_FOLDED, output_size_limit=_LARGEST_FOLDED
    )
    onnx_fusions.fuse(model)
    fuse_attention(model.graph)
    Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)


def name_initializers(graph: ir.Graph, prefix: str) -> None:
    """Cut `prefix`, the tracer's wrapper, from the initializers' names, which so become the model's own."""
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith(prefix):
            value.name = value.name.removeprefix(prefix)


def name_dimensions(values: Sequence[ir.Value], names: list[tuple[int | str | None, ...]]) -> None:
    """Name the free axes of values; None leaves an axis as it is.

    Args:
        values: Inputs or outputs of the graph.
        names: For each value one entry an axis.
    """
    for value, axes in zip(values, names, strict=True):
        if value.shape is not None:
            value.shape = ir.Shape(
                [old if new is None else new for old, new in zip(value.shape, axes, strict=True)]
            )


def forget_traces(model: ir.Model) -> None:
    """Drop what only the tracer needed: stack traces, doc strings, unused nodes, shapes of inner values."""
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)
    outer = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value not in outer:
                value.shape = None
                value.type = None
