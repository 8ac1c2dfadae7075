"""LoftQ over a whole model: its linear layers become packed ones with adapters, in place."""

# ruff: noqa: N806 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from quant.blockwise import QuantizedTensor, check_block_size, check_weight, quantize
from quant.codebooks import get_format
from quant.embedding import QuantEmbedding
from quant.errors import QuantError
from quant.linear import QuantLinear
from quant.loftq import loftq, relative_error
from quant.tree import replace_module_


@dataclass(frozen=True, slots=True, kw_only=True)
class LoftQConfig:
    """What `loftq_model` does.

    Attributes:
        format: Format of the linear layers.
        block_size: Consecutive weights that share a scale: a power of two from 16 to 4096.
        rank: Rank of the adapters.
        iterations: Alternating steps of LoftQ; 0 is QLoRA.
        include: Regular expressions; a linear layer is taken if one is found in its qualified name.
        exclude: Regular expressions; a layer, or a tied group with one such name, is left as it is.
        embedding_format: Format of embeddings that share their weight with a linear layer, and of that layer;
            None leaves both as they are.
        embedding_block_size: Their block size.

    Raises:
        QuantError: A value is out of range, a format unknown, or an expression malformed.
    """

    format: str = "nf4"
    block_size: int = 64
    rank: int = 16
    iterations: int = 5
    include: tuple[str, ...] = (".*",)
    exclude: tuple[str, ...] = ()
    embedding_format: str | None = None
    embedding_block_size: int = 32

    def __post_init__(self) -> None:
        get_format(self.format)
        if self.embedding_format is not None:
            get_format(self.embedding_format)
        check_block_size(self.block_size)
        check_block_size(self.embedding_block_size)
        if self.rank < 1 or self.iterations < 0:
            raise QuantError(
                f"rank {self.rank} with {self.iterations} iterations is not possible",
                "choose a rank of at least 1 and 0 iterations (QLoRA) or more",
            )
        for expression in (*self.include, *self.exclude):
            try:
                re.compile(expression)
            except re.error as error:
                raise QuantError(
                    f"{expression!r} is not a regular expression: {error}", "escape its special characters"
                ) from error

    def includes(self, name: str) -> bool:
        """Tell whether the linear layer of this qualified name is to be quantized."""
        return any(re.search(expression, name) for expression in self.include) and not self.excludes(name)

    def excludes(self, name: str) -> bool:
        """Tell whether the layer of this qualified name is to be left as it is."""
        return any(re.search(expression, name) for expression in self.exclude)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What became of one layer. A weight that several layers share is counted with the first of them.

    Attributes:
        name: Qualified name.
        shape: Shape of the weight.
        format: Format it is stored in.
        errors: Relative Frobenius errors: of plain quantization, then after each LoftQ iteration.
        bytes_before: Bytes of weight and bias.
        bytes_after: Bytes of codes, scales, adapters and bias.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    errors: tuple[float, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharedWeight:
    """The layers to quantize that hold one and the same weight; mostly a single one."""

    weight: Tensor
    layers: dict[str, nn.Linear | nn.Embedding]

    @property
    def embeds(self) -> bool:
        return any(isinstance(layer, nn.Embedding) for layer in self.layers.values())


def loftq_model(
    model: nn.Module, config: LoftQConfig, on_layer: Callable[[str, int, int], None] | None = None
) -> list[LayerReport]:
    """Replace the linear layers of a model by `QuantLinear` with LoftQ adapters, in place.

    Layers that share a weight share its codes, scales and adapters afterwards. A linear layer whose weight is
    an embedding's never gets adapters: with `embedding_format` both are packed and share one storage, else
    both stay. Everything is checked before the first layer is touched.

    Args:
        model: Any module tree with real weights (not on the meta device).
        config: Formats, rank, and which layers.
        on_layer: Called after each layer with its name, how many are done, and how many there are.

    Returns:
        A report for each layer replaced, in the order of the model.

    Raises:
        QuantError: No layer matches, or one cannot be quantized; the model is left as it was.
    """
    groups = _groups(model, config)
    if not groups:
        raise QuantError(
            f"no linear layer of this {type(model).__name__} is to be quantized",
            "widen `include`, narrow `exclude`, set `embedding_format` for tied weights, or wrap a model "
            "that is itself a single nn.Linear",
        )
    for group in groups:
        _check(group)
    total = sum(len(group.layers) for group in groups)
    reports: list[LayerReport] = []
    while groups:
        # Popped, so that each dense weight is freed as soon as its packed one is in place.
        for report in _replace_(model, groups.pop(0), config):
            reports.append(report)
            if on_layer is not None:
                on_layer(report.name, len(reports), total)
    return reports


def _groups(model: nn.Module, config: LoftQConfig) -> list[_SharedWeight]:
    """Return the layers to quantize, those that share a weight together, in the order of the model."""
    shared: dict[int, _SharedWeight] = {}
    for name, module in model.named_modules():
        if name and isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight
            shared.setdefault(id(weight), _SharedWeight(weight=weight, layers={})).layers[name] = module
    groups = []
    for group in shared.values():
        taken = {name: layer for name, layer in group.layers.items() if config.includes(name)}
        if group.embeds:
            tied = any(isinstance(layer, nn.Linear) for layer in group.layers.values())
            if tied and config.embedding_format and not any(map(config.excludes, group.layers)):
                groups.append(group)
        elif taken:
            groups.append(_SharedWeight(weight=group.weight, layers=taken))
    return groups


def _check(group: _SharedWeight) -> None:
    for name, layer in group.layers.items():
        plain = nn.Embedding if isinstance(layer, nn.Embedding) else nn.Linear
        if type(layer).forward is not plain.forward or getattr(layer, "max_norm", None) is not None:
            raise QuantError(
                f"{name} ({type(layer).__name__}) computes more than an {plain.__name__} does",
                "exclude it, or for a tied weight leave `embedding_format` unset",
            )
        try:
            check_weight(layer.weight)
        except QuantError as error:
            raise QuantError(f"{name}: {error.problem}", error.remedy) from error


def _replace_(model: nn.Module, group: _SharedWeight, config: LoftQConfig) -> list[LayerReport]:
    weight = group.weight
    quantized, lora_A, lora_B, errors = _compress(group, config)
    bytes_before = weight.nbytes
    bytes_after = quantized.nbytes + sum(factor.nbytes for factor in (lora_A, lora_B) if factor is not None)
    reports = []
    for name, layer in group.layers.items():
        bias = layer.bias if isinstance(layer, nn.Linear) else None
        new = (
            QuantEmbedding(quantized, dtype=weight.dtype)
            if isinstance(layer, nn.Embedding)
            else QuantLinear(quantized, bias, lora_A, lora_B, dtype=weight.dtype)
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


def _compress(
    group: _SharedWeight, config: LoftQConfig
) -> tuple[QuantizedTensor, nn.Parameter | None, nn.Parameter | None, tuple[float, ...]]:
    weight = group.weight.detach()
    if group.embeds and config.embedding_format is not None:
        quantized = quantize(weight, config.embedding_format, config.embedding_block_size)
        return quantized, None, None, (relative_error(weight.float(), quantized.dequantize()),)
    result = loftq(weight, config.format, config.rank, config.iterations, config.block_size)
    lora_A, lora_B = nn.Parameter(result.lora_A), nn.Parameter(result.lora_B)
    return result.quantized, lora_A, lora_B, tuple(result.errors)
