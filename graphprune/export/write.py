"""A model as compact ONNX files: a decoder with its cache, an encoder beside it, or any function of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from graphprune.errors import ExportError
from graphprune.export.adapter_file import BASE, base_digest
from graphprune.export.adapters import Adapters, check_adapters
from graphprune.export.axes import DynamicAxes
from graphprune.export.decoder import traceable_decoder
from graphprune.export.encoder_decoder import has_halves, traceable_halves
from graphprune.export.filenames import DECODER_FILE, ENCODER_FILE, FILE
from graphprune.export.function import traceable_function
from graphprune.export.graph_writer import MICROSOFT
from graphprune.export.halves import HALVES
from graphprune.export.joined_products import join_products
from graphprune.export.layouts import Profile, check_profile
from graphprune.export.modules import ModuleWriter
from graphprune.export.shared_cache import Cache, check_cache, share_cache
from graphprune.export.simplify import forget_traces, name_ends, name_initializers, simplify
from graphprune.export.skip_norm import fuse_skip_norms
from graphprune.export.stand_ins import DOMAIN
from graphprune.export.traceable import PREFIX, Traceable
from graphprune.export.tracing import OPSET, trace_to_onnx
from graphprune.files import replacing
from quant import PackedParameter, QuantLinear

# Smaller initializers (shapes, scalars) stay in the graph's own file.
_SMALLEST_EXTERNAL = 1024


def export_onnx(
    model: nn.Module,
    folder: str | Path,
    *,
    examples: Any = None,
    dynamic_axes: DynamicAxes | None = None,
    profile: Profile = "cpu",
    exact: bool = False,
    adapters: Adapters = "overridable",
    cache: Cache = "growing",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model as `model.onnx` and `model.onnx.data`, or a pair of such; a folder of that name is replaced whole.

    Matrices of `QuantLinear`, `QuantEmbedding` and `PackedParameter` (Conv1D's, stacks of experts) keep their bits, a
    tied head shares them, and each adapter is a pair of overridable initializers `<module>.lora_A.weight` (in, rank)
    and `<module>.lora_B.weight` (rank, out), of a stack with its matrices first. What else than a product reads a
    packed matrix gets it in float32 when a session opens the file, and an `ExportWarning` says so.

    Without examples the model is a causal language model, and the graph serves prefill and decoding, any batch
    (shorter rows padded on the left) and any length. Its inputs are input_ids, attention_mask, position_ids,
    past_key_values.N.key and past_key_values.N.value; its outputs logits (batch, sequence, vocabulary), present.N.key
    and present.N.value.

    With examples any model is written, and no cache: an encoder, a classifier, a plain net. Inputs have the examples'
    names, outputs those that the model gives them (fields or keys), else `output`, `output_1`, ....

    An encoder-decoder that generates becomes two files with caches, without examples or with examples of its encoder's
    inputs; with examples of the decoder's as well it is one graph without a cache. `encoder.onnx` gives
    last_hidden_state, and present.N.encoder.key and .value, which attention to the encoder reads; `decoder.onnx` reads
    these as past_key_values.N.encoder.key and .value, beside input_ids, encoder_attention_mask where the examples
    have an attention_mask, and past_key_values.N.decoder.key and .value of its own tokens. It serves prefill and
    decoding, and gives logits (batch, sequence, vocabulary), present.N.decoder.key and .value. A file stores the
    weights that it reads, those of both are stored twice.

    Args:
        model: A model in float32, float16 or bfloat16. It is not changed. The file computes in float32; dense matrices
            of 16 bits are stored as they are, and a session widens them when it opens.
        folder: Where the files go.
        examples: None for a causal language model of transformers that takes a `DynamicCache`, or an encoder-decoder
            that reads token ids and takes an `EncoderDecoderCache`. Else inputs as
            `graphprune.trace` takes them: keyword arguments of the model's forward by name; or one tensor, or a
            tuple of the first ones. What is no tensor in them is fixed.
        dynamic_axes: With examples, the free axes of each input and their names, such as ``{"pixel_values": {0:
            "batch_size"}}``; axes of one name have one size. None to leave free the batch, axis 0, and the
            sequence, axis 1 of integers and of what has three axes, as far as the model allows it; axes of one size
            in the examples then have one name: `batch_size`, `sequence_length`.
        profile: What the file is to run on: "cpu" and "cuda" have ONNX Runtime's own operators where these are faster,
            "portable" those of the ONNX standard alone.
        exact: Hold the quantized weights without rounding. Otherwise codebooks that ONNX Runtime has no fast
            kernel for (NF4) are rounded to the 8-bit grid on which it computes.
        adapters: "overridable" as said above; "constant", which loads a little faster; "merged" for dense float32
            weights with the adapters added.
        cache: Of a causal language model: "growing" takes the cache of the tokens before and gives a longer one; with
            "shared" both may be one buffer, as onnxruntime-genai has it, and nothing is copied. Several new tokens of
            several texts behind earlier ones can then not be computed at once.
        metadata: Entries for the file's `metadata_props`.

    Returns:
        The path of `model.onnx`; of a pair the folder.

    Raises:
        ExportError: If the model cannot be traced or translated, or does not take the examples.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ExportError(f"{folder} is a file", "give a folder of its own")
    check_profile(profile)
    check_adapters(adapters)
    check_cache(cache, profile, decoder=examples is None and not has_halves(model, examples))
    _check(model, examples, dynamic_axes)
    metadata = {**(metadata or {}), **_base(model, adapters)}
    training = model.training
    model.eval()
    try:
        traceables = _traceables(model, examples, dynamic_axes)
        with replacing(folder) as temporary:
            temporary.mkdir()
            for file, traceable in traceables.items():
                onnx = _translated(model, traceable, profile, exact, adapters, cache)
                onnx.metadata_props.update(metadata)
                data = f"{file}.data"
                ir.save(onnx, temporary / file, external_data=data, size_threshold_bytes=_SMALLEST_EXTERNAL)
    finally:
        model.train(training)
    return folder / FILE if FILE in traceables else folder


def _traceables(model: nn.Module, examples: Any, dynamic_axes: DynamicAxes | None) -> dict[str, Traceable]:
    """Return a model as the tracer takes it, for each file by its name."""
    if has_halves(model, examples):
        encoder, decoder = traceable_halves(model, examples, dynamic_axes)
        return {DECODER_FILE: decoder, ENCODER_FILE: encoder}
    if examples is None:
        return {FILE: traceable_decoder(model)}
    return {FILE: traceable_function(model, examples, dynamic_axes)}


def _translated(
    model: nn.Module, traceable: Traceable, profile: Profile, exact: bool, adapters: Adapters, cache: Cache
) -> ir.Model:
    onnx = trace_to_onnx(model, traceable)
    name_initializers(onnx.graph, PREFIX, [*traceable.input_names, *traceable.output_names])
    simplify(onnx)
    if cache == "shared":
        share_cache(onnx.graph, dict(zip(traceable.input_names, onnx.graph.inputs, strict=False)))
    if profile != "portable":
        fuse_skip_norms(onnx.graph)
    ModuleWriter(model, onnx.graph, profile=profile, exact=exact, adapters=adapters).write_all()
    join_products(onnx.graph)
    _finish(onnx, traceable)
    _check_written(onnx.graph)
    return onnx


def _finish(onnx: ir.Model, traceable: Traceable) -> None:
    name_ends(onnx.graph, traceable.input_names, traceable.output_names)
    traceable.name_axes(onnx.graph)
    forget_traces(onnx)
    onnx.graph.name = traceable.graph_name
    onnx.opset_imports[""] = OPSET
    if any(node.domain == MICROSOFT for node in onnx.graph):
        onnx.opset_imports[MICROSOFT] = 1


def _check_written(graph: ir.Graph) -> None:
    """Raise if something is left that only stands for what no operator computes."""
    for node in graph:
        if node.domain == DOMAIN:
            raise ExportError(
                f"{node.op_type} is read, of which the file has no numbers",
                "export models whose decoder reads the encoder's states only through its cache",
            )


def _base(model: nn.Module, adapters: Adapters) -> dict[str, str]:
    """Return what ties adapter files to the packed weights, where there are any to be overridden."""
    packed = any(isinstance(module, QuantLinear | PackedParameter) for module in model.modules())
    return {BASE: base_digest(model)} if packed and adapters == "overridable" else {}


def _check(model: nn.Module, examples: Any, dynamic_axes: DynamicAxes | None) -> None:
    if examples is None and dynamic_axes is not None:
        raise ExportError("dynamic_axes are of examples, of which there are none", "give both or neither")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, *HALVES) or parameter.device.type != "cpu":
            raise ExportError(
                f"parameter {name} is {parameter.dtype} on {parameter.device}, and the export wants float32, "
                "float16 or bfloat16 on the CPU",
                "call model.to('cpu', torch.float32) first",
            )
