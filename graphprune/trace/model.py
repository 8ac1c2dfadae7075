"""Whatever holds a model, traced: a torch module, an exported program, or an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphprune.errors import TraceError
from graphprune.trace.graph import OperatorGraph


def trace(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic: bool = True,
) -> OperatorGraph:
    """Trace a model into an operator graph.

    Args:
        model: A ``torch.nn.Module`` (PEFT-wrapped ones show their adapters by name; weights may live on the meta
            device), a ``torch.export.ExportedProgram``, the path of an ``.onnx`` file, or an ``onnx_ir.Model``.
        example_inputs: Keyword arguments of the module's forward by name; or one tensor, or a tuple of its first
            arguments. Sizes that collide with nothing are best, such as a batch of 2 and a sequence of 11. A forward
            that names ``use_cache`` and is not told gets False. An ONNX model takes sizes by the names of its
            symbolic dimensions here, or none.
        dynamic: Whether the batch and the sequence stay open in the program; a `TraceWarning` tells where the model
            does not allow it.

    Returns:
        The operator graph, which keeps the front end's own program for surgery.

    Raises:
        TraceError: If the model cannot be traced.
    """
    if isinstance(model, (str, Path)) or type(model).__module__.startswith("onnx_ir"):
        from graphprune.trace.onnx import trace_onnx

        return trace_onnx(model, example_inputs)

    from torch import nn
    from torch.export import ExportedProgram

    from graphprune.trace.fx import trace_module, trace_program

    if isinstance(model, ExportedProgram):
        return trace_program(model)
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"a {type(model).__name__} cannot be traced",
            "give a torch module, an ExportedProgram, an onnx_ir.Model, or the path of an .onnx file",
        )
    if example_inputs is None:
        raise TraceError(
            f"{type(model).__name__} cannot be traced without example inputs",
            "give the keyword arguments of its forward: trace(model, {'input_ids': ...})",
        )
    return trace_module(model, example_inputs, dynamic=dynamic)
