"""A transformers causal language model as one compact ONNX file with a key-value cache."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from graphprune.errors import ExportError
from graphprune.export.adapter_file import BASE, base_digest
from graphprune.export.decoder import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    CachedDecoder,
    CacheLayer,
    cache_layers,
    cache_names,
    dynamic_shapes,
    example_inputs,
)
from graphprune.export.graph_writer import MICROSOFT
from graphprune.export.layouts import Profile, check_profile
from graphprune.export.modules import Adapters, ModuleWriter, check_adapters
from graphprune.export.simplify import forget_traces, name_dimensions, name_initializers, simplify
from graphprune.export.skip_norm import fuse_skip_norms
from graphprune.export.stand_ins import replaced, stand_in
from graphprune.files import replacing
from quant import QuantLinear

FILE = "model.onnx"
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
DATA_FILE = "model.onnx.data"
OPSET = 23

# Smaller initializers (shapes, scalars) stay in the graph's own file.
_SMALLEST_EXTERNAL = 1024


def export_onnx(
    model: nn.Module,
    folder: Path,
    *,
    profile: Profile = "cpu",
    exact: bool = False,
    adapters: Adapters = "overridable",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model as `model.onnx` and `model.onnx.data`; a folder of that name is replaced whole.

    The graph serves prefill and decoding, any batch (shorter rows padded on the left) and any length. Matrices
    of `QuantLinear` and `QuantEmbedding` keep their bits, a tied head shares them, and each adapter is a pair of
    overridable initializers `<module>.lora_A.weight` (in, rank) and `<module>.lora_B.weight` (rank, out).

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key, past_key_values.N.value.
    Outputs: logits (batch, sequence, vocabulary), present.N.key, present.N.value.

    Args:
        model: A float32 causal language model of transformers that takes a `DynamicCache`. It is not changed.
        folder: Where the two files go.
        profile: What the file is to run on: "cpu" and "cuda" have ONNX Runtime's own operators where these are faster,
            "portable" those of the ONNX standard alone.
        exact: Hold the quantized weights without rounding. Otherwise codebooks that ONNX Runtime has no fast
            kernel for (NF4) are rounded to the 8-bit grid on which it computes.
        adapters: "overridable" as said above; "constant", which loads a little faster; "merged" for dense float32
            weights with the adapters added.
        metadata: Entries for the file's `metadata_props`.

    Returns:
        The path of `model.onnx`.

    Raises:
        ExportError: If the model cannot be traced or translated.
    """
    check_profile(profile)
    check_adapters(adapters)
    _check(model)
    training = model.training
    model.eval()
    try:
        layers = cache_layers(model)
        onnx = _trace(model, layers)
        name_initializers(onnx.graph, CachedDecoder.PREFIX)
        simplify(onnx)
        if profile != "portable":
            fuse_skip_norms(onnx.graph)
        ModuleWriter(model, onnx.graph, profile=profile, exact=exact, adapters=adapters).write_all()
    finally:
        model.train(training)
    _finish(onnx, layers, {**(metadata or {}), **_base(model, adapters)})
    with replacing(folder) as temporary:
        temporary.mkdir()
        ir.save(onnx, temporary / FILE, external_data=DATA_FILE, size_threshold_bytes=_SMALLEST_EXTERNAL)
    return folder / FILE


def _trace(model: nn.Module, layers: list[CacheLayer]) -> ir.Model:
    """Return the ONNX graph of a model in which every matrix is a stand-in."""
    stand_ins = {name: stand_in(name, module) for name, module in model.named_modules(remove_duplicate=False)}
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            _grouped_query_attention(),
            replaced(model, {name: module for name, module in stand_ins.items() if module is not None}),
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                CachedDecoder(model, layers),
                example_inputs(layers),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes(layers),
                input_names=[*TOKEN_INPUTS, *cache_names(layers, "past_key_values")],
                output_names=["logits", *cache_names(layers, "present")],
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as err:
        reason = str(err.__cause__ or err).strip().split("\n")[0]
        raise ExportError(
            f"the model could not be translated to ONNX opset {OPSET}: {reason}",
            "check that it runs with a DynamicCache and explicit position_ids; the cause holds the full trace",
        ) from err
    if program is None:
        raise ExportError("the tracer returned nothing", "report this as a bug")
    return program.model


def _finish(onnx: ir.Model, layers: list[CacheLayer], metadata: Mapping[str, str]) -> None:
    tokens = (BATCH, SEQUENCE)
    past: list[tuple[int | str | None, ...]] = []
    present: list[tuple[int | str | None, ...]] = []
    for layer in layers:
        for heads, size in (layer.key, layer.value):
            past.append((BATCH, heads, PAST, size))
            present.append((BATCH, heads, TOTAL, size))
    inputs = onnx.graph.inputs[: len(TOKEN_INPUTS) + len(past)]
    name_dimensions(inputs, [tokens, (BATCH, TOTAL), tokens, *past])
    name_dimensions(onnx.graph.outputs, [(BATCH, SEQUENCE, None), *present])
    forget_traces(onnx)
    onnx.graph.name = "decoder"
    onnx.opset_imports[""] = OPSET
    if any(node.domain == MICROSOFT for node in onnx.graph):
        onnx.opset_imports[MICROSOFT] = 1
    onnx.metadata_props.update(metadata)


def _base(model: nn.Module, adapters: Adapters) -> dict[str, str]:
    """Return what ties adapter files to the packed weights, where there are any to be overridden."""
    packed = any(isinstance(module, QuantLinear) for module in model.modules())
    return {BASE: base_digest(model)} if packed and adapters == "overridable" else {}


def _check(model: nn.Module) -> None:
    wrong = {
        name: p for name, p in model.named_parameters() if p.dtype != torch.float32 or p.device.type != "cpu"
    }
    for name, parameter in wrong.items():
        raise ExportError(
            f"parameter {name} is {parameter.dtype} on {parameter.device}, and the export wants float32 on the CPU",
            "call model.to('cpu', torch.float32) first",
        )


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
