"""LoftQ over a whole model: its linear layers become packed ones with adapters, in place."""

# ruff: noqa: N806 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from quant.affine import StandIn, linearized
from quant.blockwise import quantize
from quant.calibration import Batch, as_batches, collect_covariances, evaluation
from quant.chain import BlockCall, find_chain
from quant.config import LoftQConfig, Reconstruction, check_formats
from quant.embedding import QuantEmbedding
from quant.errors import QuantError
from quant.guidance import Loss, check_loss, token_importance
from quant.linear import QuantLinear
from quant.loftq import loftq, relative_error
from quant.quantized import QuantizedTensor
from quant.reconstruction import reconstruct_block_
from quant.row_scale import row_scale
from quant.sequential import Compress, Finish, quantize_chain
from quant.shared import SharedWeight, shared_weights
from quant.tree import replace_module_


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What became of one layer. A weight that several layers share is counted with the first of them.

    Attributes:
        name: Qualified name.
        shape: Shape of the weight.
        format: Format it is stored in.
        errors: Relative errors, as in `LoftQResult`: of plain quantization, then after each LoftQ iteration.
        bytes_before: Bytes of weight and bias.
        bytes_after: Bytes of codes, scales, adapters and bias.
        block_errors: With `LoftQConfig.reconstruction`, the error of what the layer's block puts out, before and after
            that; `errors` are from before then. None for layers outside of the model's chain of blocks.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    errors: tuple[float, ...]
    bytes_before: int
    bytes_after: int
    block_errors: tuple[float, float] | None = None

    @property
    def error(self) -> float:
        """Of what LoftQ left in the layer: the least of `errors`."""
        return min(self.errors)


def loftq_model(
    model: nn.Module,
    config: LoftQConfig,
    batches: Iterable[Batch] | None = None,
    *,
    loss: Loss | None = None,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> tuple[nn.Module, list[LayerReport]]:
    """Replace the linear layers of a model by `QuantLinear` with LoftQ adapters, in place.

    Layers that share a weight share its codes, scales and adapters afterwards. A linear layer whose weight is
    an embedding's never gets adapters: with `embedding_format` both are packed and share one storage, else
    both stay. Everything is checked before the first layer is touched.

    With calibration batches each layer is fitted to the inputs that it will get: block after block, where the
    model is a chain of blocks, so that a layer sees what those before it have become; else all from one run of
    the model as it was. With a loss too, errors count by how much they would raise it.

    Args:
        model: Any module tree with real weights (not on the meta device).
        config: Formats, rank, and which layers.
        batches: What the model is called with: tensors, mappings of keyword arguments, or sequences of
            positional ones. A few dozen windows of ordinary text. None for LoftQ as published, without data.
        loss: Of what the model returns, such as ``lambda output: output.loss`` where batches hold labels; its
            gradients tell what each token counts. None for all alike.
        on_layer: Called after each layer with its name, how many are done, and how many there are.

    Returns:
        The model that was given, and a report for each layer replaced, in the order in which that was done.

    Raises:
        QuantError: No layer matches, or one cannot be quantized; the model is left as it was.
    """
    with linearized(model, config.includes):
        return model, _loftq_linears(model, config, batches, loss, on_layer)


def _loftq_linears(
    model: nn.Module,
    config: LoftQConfig,
    batches: Iterable[Batch] | None,
    loss: Loss | None,
    on_layer: Callable[[str, int, int], None] | None,
) -> list[LayerReport]:
    check_loss(loss, batches)
    if config.compensated and batches is None:
        raise QuantError("compensated rounding without calibration batches", "pass `batches`")
    if config.reconstruction is not None and batches is None:
        raise QuantError("reconstruction without calibration batches", "pass `batches`")
    groups = shared_weights(model, config)
    check_formats(config.formats, [name for group in groups for name in group.layers])
    total = sum(len(group.layers) for group in groups)
    reports: list[LayerReport] = []
    waiting = {group.name: group for group in groups}

    def compress(name: str, target: Tensor, covariance: Tensor | None) -> None:
        # Popped, so that each dense weight is freed as soon as its packed one is in place.
        for report in _replace_(model, waiting.pop(name), config, target, covariance):
            reports.append(report)
            if on_layer is not None:
                on_layer(report.name, len(reports), total)

    def finish(
        name: str,
        block: nn.Module,
        calls: Sequence[BlockCall],
        inputs: list[Tensor],
        targets: list[Tensor],
    ) -> list[Tensor]:
        found = reconstruct_block_(
            block,
            calls,
            inputs,
            targets,
            config.reconstruction or Reconstruction(),
            layer_seed(config.seed, name),
        )
        errors = found.before, found.after
        reports[:] = [
            replace(report, block_errors=errors) if report.name.startswith(f"{name}.") else report
            for report in reports
        ]
        return found.outputs

    del groups
    covariances = (
        {}
        if batches is None
        else _calibrate(model, as_batches(batches), loss, waiting, config, compress, finish)
    )
    for name in list(waiting):
        compress(name, waiting[name].weight.detach(), covariances.get(name))
    return reports


def _calibrate(
    model: nn.Module,
    batches: list[Batch],
    loss: Loss | None,
    groups: dict[str, SharedWeight],
    config: LoftQConfig,
    compress: Compress,
    finish: Finish,
) -> dict[str, Tensor]:
    """Compress the layers of the model's chain of blocks, and return the covariances of the others."""
    alone = {
        name: layer
        for name, group in groups.items()
        if not group.embeds and len(group.layers) == 1 and isinstance(layer := group.layers[name], nn.Linear)
    }
    importance: dict[str, list[Tensor]] = {}
    measurable = [name for name in groups if not groups[name].embeds]
    if loss is not None and measurable:
        measured = token_importance(model, batches, measurable, loss)
        importance = {name: found.calls for name, found in measured.items()}
    with evaluation(model):
        chain = find_chain(model, batches, list(alone))
        reconstructed = config.reconstruction is not None
        if reconstructed and chain is None:
            raise QuantError(
                "no layer to quantize is in a chain of blocks, an nn.ModuleList of which each runs once on what the "
                "one before puts out, so that no block can be reconstructed",
                "quantize without `reconstruction`",
            )
        inside = {name: layer for name, layer in alone.items() if chain is not None and chain.holds(name)}
        outside = [name for name, group in groups.items() if name not in inside and not group.embeds]
        # Before anything is compressed: these layers are fitted to the model as it was.
        covariances = collect_covariances(model, batches, outside, importance) if outside else {}
        if chain is not None:
            quantize_chain(
                chain, inside, config.propagation, compress, importance, finish if reconstructed else None
            )
    return covariances


def _replace_(
    model: nn.Module, group: SharedWeight, config: LoftQConfig, target: Tensor, covariance: Tensor | None
) -> list[LayerReport]:
    weight = group.weight
    quantized, lora_A, lora_B, errors = compress_weight(group, config, target, covariance)
    bytes_before = weight.nbytes
    bytes_after = quantized.nbytes + sum(factor.nbytes for factor in (lora_A, lora_B) if factor is not None)
    reports = []
    for name, layer in group.layers.items():
        bias = layer.bias if isinstance(layer, nn.Linear) else None
        new = (
            QuantEmbedding(quantized, weight.dtype, row_scale(layer, name))
            if isinstance(layer, nn.Embedding)
            else QuantLinear(
                quantized,
                bias,
                lora_A,
                lora_B,
                config.scaling,
                weight.dtype,
                transposed=isinstance(layer, StandIn) and layer.transposed,
            )
        )
        replace_module_(model, layer, new)
        bias_bytes = 0 if bias is None else bias.nbytes
        reports.append(
            LayerReport(
                name=name,
                shape=quantized.shape,
                format=quantized.format,
                errors=errors,
                bytes_before=bytes_before + bias_bytes,
                bytes_after=bytes_after + bias_bytes,
            )
        )
        bytes_before = bytes_after = 0
    return reports


def compress_weight(
    group: SharedWeight, config: LoftQConfig, target: Tensor, covariance: Tensor | None
) -> tuple[QuantizedTensor, nn.Parameter | None, nn.Parameter | None, tuple[float, ...]]:
    """Compress one weight as `loftq_model` does.

    Args:
        group: The layers that hold it.
        config: Its format, of linear layers or of embeddings, and rank.
        target: The weight, of the shape of the group's.
        covariance: Of the layers' inputs, as in `quant.loftq`; None for LoftQ as published.

    Returns:
        The packed weight; the adapters A and B, None for an embedding's; and the errors on the way.
    """
    if group.embeds and config.embedding_format is not None:
        quantized = quantize(target, config.embedding_format, config.embedding_block_size)
        return quantized, None, None, (relative_error(target.float(), quantized.dequantize()),)
    result = loftq(
        target,
        config.format_of(group.name),
        config.rank,
        config.iterations,
        config.block_size,
        covariance=covariance,
        compensated=config.compensated if covariance is not None else False,
        scale_storage=config.scale_storage,
        seed=layer_seed(config.seed, group.name),
        name=group.name,
    )
    # Divided, so that the product is right after the model has multiplied it by the scaling.
    root = math.sqrt(config.scaling)
    lora_A, lora_B = nn.Parameter(result.lora_A / root), nn.Parameter(result.lora_B / root)
    return result.quantized, lora_A, lora_B, tuple(result.errors)


def layer_seed(seed: int, name: str) -> int:
    """Return a layer's own seed: it depends on the name alone, not on which layers came before."""
    return zlib.crc32(f"{seed} {name}".encode())
