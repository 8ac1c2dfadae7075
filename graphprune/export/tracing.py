"""From a model to its ONNX graph, in which every matrix is a stand-in."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from graphprune.errors import ExportError
from graphprune.export.broadcast_heads import grouped_heads
from graphprune.export.grouped_products import opaque_grouped_products
from graphprune.export.halves import in_float32, widened
from graphprune.export.stand_ins import replaced, stand_in
from graphprune.export.traceable import Traceable

OPSET = 23


def trace_to_onnx(model: nn.Module, traceable: Traceable) -> ir.Model:
    """Return the ONNX graph of a model in which every matrix is a stand-in.

    Args:
        model: The model; on return it is as it was.
        traceable: The same model as the tracer takes it.

    Raises:
        ExportError: If it cannot be traced or translated.
    """
    stand_ins = {name: stand_in(name, module) for name, module in model.named_modules(remove_duplicate=False)}
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            _grouped_query_attention(),
            _layers_as_written(),
            grouped_heads(),
            opaque_grouped_products(),
            traceable.context(),
            replaced(model, {name: module for name, module in stand_ins.items() if module is not None}),
            in_float32(model),
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traceable.module,
                widened(traceable.arguments),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=traceable.dynamic_shapes,
                input_names=traceable.input_names,
                output_names=traceable.output_names,
                optimize=False,
                verbose=False,
            )
            _hold_numbers(program)
    except torch.onnx.OnnxExporterError as err:
        first, *more = str(err.__cause__ or err).strip().splitlines()
        reason = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
        raise ExportError(
            f"the model could not be translated to ONNX opset {OPSET}: {reason}",
            f"{traceable.remedy}; the cause holds the full trace",
        ) from err
    if program is None:
        raise ExportError("the tracer returned nothing", "report this as a bug")
    _write_fixed_sizes(program)
    return program.model


def _hold_numbers(program: torch.onnx.ONNXProgram | None) -> None:
    """Keep the numbers that initializers have now, whatever becomes of the parameters they are read from."""
    for value in () if program is None else program.model.graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, Tensor):
            value.const_value = TorchTensor(raw.detach(), name=value.name)


def _write_fixed_sizes(program: torch.onnx.ONNXProgram) -> None:
    """Write sizes that the model allows one value for as numbers; the tracer leaves symbols for them."""
    constraints = {} if program.exported_program is None else program.exported_program.range_constraints
    only = {
        str(symbol): int(sizes.lower) for symbol, sizes in constraints.items() if sizes.lower == sizes.upper
    }
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    only.get(str(size.value), size) if isinstance(size, ir.SymbolicDim) else size
                    for size in value.shape
                ]
            )


@contextmanager
def _layers_as_written() -> Iterator[None]:
    """Keep torch from computing whole transformer layers by an operator that no other runtime has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _grouped_query_attention() -> Iterator[None]:
    """Make transformers hand keys and values un-repeated to attention; ONNX's operator groups queries itself."""
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
