"""From the tracer's graph to a small, readable one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir
from onnx_ir.passes import Sequential, common
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions

from graphprune.export.attention import fuse_attention
from graphprune.export.rotary import spread_angles

# Only shapes and other small things are folded: what is larger is data, and keeps its name.
_LARGEST_FOLDED = 1024


def simplify(model: ir.Model) -> None:
    """Fold constants and fuse operators (RMSNormalization, RotaryEmbedding, Attention) while shapes are known."""
    optimizer.optimize_ir(
        model, onnx_shape_inference=False, input_size_limit=_LARGEST_FOLDED, output_size_limit=_LARGEST_FOLDED
    )
    onnx_fusions.fuse(model)
    spread_angles(model.graph)
    drop_idle_reshapes(model.graph)
    fuse_attention(model.graph)
    Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)


def drop_idle_reshapes(graph: ir.Graph) -> None:
    """Let the readers of a Reshape that changes nothing read what it reads, while shapes are known."""
    for node in [node for node in graph if node.op_type == "Reshape" and node.domain == ""]:
        before, after = node.inputs[0], node.outputs[0]
        if (
            before is not None
            and before.shape is not None
            and before.shape == after.shape
            and ir.SymbolicDim(None) not in before.shape
            and not after.is_graph_output()
        ):
            after.replace_all_uses_with(before)
            graph.remove(node, safe=True)


def name_initializers(graph: ir.Graph, prefix: str, taken: Collection[str]) -> None:
    """Cut `prefix`, the tracer's wrapper, from the initializers' names, which so become the model's own.

    Args:
        graph: As it was traced.
        prefix: What is cut off.
        taken: Names of inputs and outputs: an initializer that then had one of these keeps the prefix.
    """
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith(prefix):
            name = value.name.removeprefix(prefix)
            value.name = value.name if name in taken else name


def name_ends(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name inputs and outputs; an output that is an input too, or an output already, is passed on by an Identity.

    Args:
        graph: The graph.
        inputs: Names of its first inputs.
        outputs: Names of all outputs.
    """
    seen = set(graph.inputs)
    for value, name in zip(graph.inputs, inputs, strict=False):
        value.name = name
    for index, (value, name) in enumerate(zip(list(graph.outputs), outputs, strict=True)):
        output = value
        if value in seen:
            passed_on = ir.node("Identity", [value], name=f"{name}/Identity")
            output = passed_on.outputs[0]
            output.shape, output.type = value.shape, value.type
            graph.append(passed_on)
            graph.outputs[index] = output
        output.name = name
        seen.add(output)


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
