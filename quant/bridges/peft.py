"""LoftQ in a PEFT model, on any device: the base becomes Q, and the adapters what makes up for its error.

Differs from PEFT's own ``init_lora_weights="loftq"`` (0.21) in what follows. With alpha equal to the rank, where both
are right, Q is the same to the bit and the products agree.

- PEFT stores LoftQ's factors as they are, so that the adapter's scaling (alpha / r, or alpha / sqrt(r) under rsLoRA)
  multiplies their product: at alpha = 2 r the error is that of no adapter at all. Here each factor is divided by
  the square root of the scaling.
- PEFT takes Conv1D's (in, out) weight for (out, in), and fails on embeddings and stacked parameters.
- PEFT needs a GPU and bitsandbytes, takes a full SVD, knows NF4 and int8 alone, and returns the last iterate where
  `quant.loftq` returns the best one.
"""

# ruff: noqa: N806 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.apply import LayerReport
from quant.blockwise import check_weight
from quant.codebooks import get_format
from quant.errors import QuantError
from quant.linear import QuantLinear
from quant.loftq import LoftQResult
from quant.parameters import pack_parameter_
from quant.quantized import check_block_size
from quant.scales import Storage
from quant.stack import check_stackable, loftq_stack
from quant.tree import replace_module_

BASE_KEEPING = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base weight as it was."""


ZERO_PRODUCT = (True, "gaussian")
"""Those of them that start with one factor zero."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Target:
    """A LoRA layer of PEFT, and the parameter below it.

    Attributes:
        name: Of the module in the base model; of the parameter where PEFT wraps one.
        layer: ``peft.tuners.lora.layer.Linear``, ``Embedding`` or ``ParamWrapper``.
        kind: Which of them: "linear", "embedding" or "parameter".
        holder: The module that holds the parameter.
        key: The parameter's name there.
        transposed: Whether the parameter is (..., in_features, out_features).
        adapters: Names of the adapters to initialize.
        untouched_product: Whether fresh adapters have a product of zero.
    """

    name: str
    layer: Any
    kind: str
    holder: nn.Module
    key: str
    transposed: bool
    adapters: tuple[str, ...]
    untouched_product: bool

    @property
    def weight(self) -> Tensor:
        weight: Tensor = getattr(self.holder, self.key)
        return weight

    @property
    def rank(self) -> int:
        return max(self.layer.r[adapter] for adapter in self.adapters)


def loftq_peft_(
    peft_model: nn.Module,
    format: str | int = "nf4",
    iterations: int = 5,
    block_size: int = 64,
    *,
    adapter_name: str | Sequence[str] = "default",
    covariances: Mapping[str, Tensor] | None = None,
    packed: bool = False,
    scale_storage: Storage = "float32",
    seed: int = 0,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> list[LayerReport]:
    """Initialize the adapters of a PEFT model by LoftQ and quantize its base, in place.

    Linear layers, transformers' Conv1D, embeddings and parameters (``target_parameters``, stacked experts too) are
    taken, with their own rank and scaling each (``rank_pattern``, ``alpha_pattern``, rsLoRA). DoRA's magnitudes
    become the norms of the new rows. Everything is checked before the first layer is touched.

    Args:
        peft_model: What ``peft.get_peft_model(model, LoraConfig(...))`` returned, its base in floating point.
        format: A name of `quant.format_names()`, or a number of bits for the best format of that many.
        iterations: Alternating steps; 0 gives QLoRA's start.
        block_size: Consecutive weights that share a scale.
        adapter_name: The adapter, or several that are to share one base: LoftQ is run with the largest rank, and
            the others get its leading components.
        covariances: By name of the layer in the base model, the mean of ``x^T x`` over its inputs:
            (in_features, in_features), or one for each expert of a stack. Layers without one get LoftQ as published.
        packed: Whether the base is kept in packed form (`QuantLinear`), not as dequantized numbers. Adapters of
            such a base cannot be merged into it, and ``target_parameters`` are refused.
        scale_storage: As in `quant.loftq`.
        seed: As in `quant.loftq`.
        on_layer: Called after each layer with its name, how many are done, and how many there are.

    Returns:
        A report for each layer, named as in the base model; its bytes are those of base weight and adapters. A
        weight that several layers share is counted with the first of them.

    Raises:
        QuantError: The model has no such adapter, or a layer cannot be initialized; it is left as it was.
    """
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    get_format(format)
    check_block_size(block_size)
    groups = _groups(peft_model, names, packed)
    for group in groups:
        check_stackable(group[0].weight, block_size, scale_storage, group[0].name)
    taken = {target.name for group in groups for target in group}
    unknown = sorted(set(covariances or {}) - taken)
    if unknown:
        raise QuantError(
            f"a covariance is given for {unknown[0]}, which has no adapter here", "name its layer"
        )
    total = sum(map(len, groups))
    reports: list[LayerReport] = []
    for group in groups:
        first = group[0]
        result = loftq_stack(
            first.weight.detach().mT if first.transposed else first.weight.detach(),
            format,
            first.rank,
            iterations,
            block_size,
            covariance=None if covariances is None else covariances.get(first.name),
            scale_storage=scale_storage,
            seed=seed,
            name=first.name,
        )
        before = first.weight.nbytes
        after = result.quantized.nbytes if packed else before
        _write_base_(peft_model, group, result, packed)
        for target in group:
            adapters = sum(_write_adapter_(target, adapter, result) for adapter in target.adapters)
            reports.append(
                LayerReport(
                    name=target.name,
                    shape=result.quantized.shape,
                    format=result.quantized.format,
                    errors=tuple(result.errors),
                    bytes_before=before + adapters,
                    bytes_after=after + adapters,
                )
            )
            before = after = 0
            if on_layer is not None:
                on_layer(target.name, len(reports), total)
    return reports


def _groups(peft_model: nn.Module, names: tuple[str, ...], packed: bool) -> list[list[_Target]]:
    """Return the layers to initialize, checked, those that share a weight together."""
    configs = getattr(peft_model, "peft_config", {})
    for name in names:
        if name not in configs:
            raise QuantError(
                f"this {type(peft_model).__name__} has no adapter {name!r}",
                f"pass a model of peft.get_peft_model, and one of {', '.join(map(repr, configs)) or 'its adapters'}",
            )
        if getattr(configs[name], "init_lora_weights", None) is None:
            raise QuantError(
                f"the adapter {name!r} is {type(configs[name]).__name__.removesuffix('Config')}, not LoRA",
                "use a LoraConfig",
            )
        if configs[name].init_lora_weights not in BASE_KEEPING:
            raise QuantError(
                f"the adapter {name!r} was made with init_lora_weights={configs[name].init_lora_weights!r}, "
                "which has changed the base weights",
                "load the model again and leave init_lora_weights at True",
            )
    groups: dict[int, list[_Target]] = {}
    for target in _targets(peft_model, names):
        _check(target, packed)
        groups.setdefault(id(target.weight), []).append(target)
    if not groups:
        raise QuantError(
            f"no layer has an adapter {' or '.join(names)}", "set target_modules in the LoraConfig"
        )
    for group in groups.values():
        _check_shared(peft_model, group)
    return list(groups.values())


def _targets(peft_model: nn.Module, names: tuple[str, ...]) -> list[_Target]:
    from peft.tuners.lora import layer as lora

    kinds = {lora.Linear: "linear", lora.Embedding: "embedding", lora.ParamWrapper: "parameter"}
    configs: Any = peft_model.peft_config
    targets = []
    for name, layer in peft_model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        held = {*layer.lora_A, *layer.lora_embedding_A}
        adapters = tuple(adapter for adapter in names if adapter in held)
        if not adapters:
            continue
        name = name.removeprefix("base_model.model.")
        kind = kinds.get(type(layer))
        if kind is None or held != set(adapters) or layer.merged_adapters:
            raise _unfit(name, layer, held, adapters)
        holder = layer.get_base_layer()
        targets.append(
            _Target(
                name=name if kind != "parameter" else f"{_without_wrappers(name)}.{layer.parameter_name}",
                layer=layer,
                kind=kind,
                holder=holder,
                key="weight" if kind != "parameter" else layer.parameter_name,
                transposed=_transposed(layer, kind, holder),
                adapters=adapters,
                untouched_product=all(
                    configs[adapter].init_lora_weights in ZERO_PRODUCT for adapter in adapters
                ),
            )
        )
    return targets


def _unfit(name: str, layer: Any, held: set[str], adapters: tuple[str, ...]) -> QuantError:
    if layer.merged_adapters:
        return QuantError(f"{name} has adapters merged into its base", "call unmerge_adapter() first")
    if held != set(adapters):
        others = ", ".join(sorted(held - set(adapters)))
        return QuantError(
            f"{name} has other adapters too ({others}), whose base would change under them",
            "name them all in `adapter_name` to initialize them together",
        )
    return QuantError(
        f"{name} is a {type(layer).__module__}.{type(layer).__name__}, which has no LoftQ here",
        "target linear layers, Conv1D, embeddings or parameters of a model in floating point",
    )


def _without_wrappers(name: str) -> str:
    """Return the name of a module without the layers that PEFT nests, one for each parameter of it."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def _transposed(layer: Any, kind: str, holder: nn.Module) -> bool:
    if kind == "parameter":
        return layer.get_param().dim() == 3 and bool(getattr(holder, "is_transposed", False))
    return kind == "linear" and bool(layer.fan_in_fan_out)


def _check(target: _Target, packed: bool) -> None:
    if not isinstance(target.weight, nn.Parameter):
        raise QuantError(f"the base of {target.name} is packed already", "load the model again")
    check_weight(target.weight, target.name)
    for adapter in target.adapters:
        if target.untouched_product and _has_learned(target, adapter):
            raise QuantError(
                f"the adapter {adapter!r} of {target.name} is not zero any more, and LoftQ would discard it",
                "load the model again and make fresh adapters",
            )
        scaling = target.layer.scaling[adapter]
        if not (math.isfinite(scaling) and scaling > 0):
            raise QuantError(f"{target.name} scales {adapter!r} by {scaling}", "set lora_alpha above 0")
        variant = target.layer.lora_variant.get(adapter)
        if variant is not None and not type(variant).__name__.startswith("Dora"):
            raise QuantError(
                f"{target.name} uses {type(variant).__name__} for {adapter!r}",
                "use plain LoRA, rsLoRA or DoRA",
            )
    if packed and target.kind == "parameter":
        raise QuantError(
            f"{target.name} is a parameter that PEFT wraps anew in every forward, which fails over a packed one",
            "set packed=False, or take it out of target_parameters and call quant.loftq_parameter_",
        )


def _has_learned(target: _Target, adapter: str) -> bool:
    """Whether an adapter that began with a product of zero has another now."""
    layer = target.layer
    if target.kind == "embedding":
        factors = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return all(bool(factor.detach().any()) for factor in factors)


def _check_shared(peft_model: nn.Module, group: list[_Target]) -> None:
    """Refuse a weight that a layer without these adapters shares: nothing would make up for its error there."""
    weight = group[0].weight
    taken = {(id(target.holder), target.key) for target in group}
    for name, module in peft_model.named_modules():
        for key, held in module._parameters.items():
            if held is weight and (id(module), key) not in taken:
                raise QuantError(
                    f"{group[0].name} shares its weight with {name.removeprefix('base_model.model.')}, "
                    "which has no adapter to make up for the error",
                    "target both or neither",
                )
    if len({target.rank for target in group}) > 1 or len({target.transposed for target in group}) > 1:
        raise QuantError(
            f"{' and '.join(target.name for target in group)} share a weight, but not the rank of its adapters",
            "give them one rank",
        )


@torch.no_grad()
def _write_base_(peft_model: nn.Module, group: list[_Target], result: LoftQResult, packed: bool) -> None:
    first, quantized, dtype = group[0], result.quantized, group[0].weight.dtype
    if not packed:
        dense = quantized.dequantize(dtype)
        first.weight.copy_(dense.mT if first.transposed else dense)
        return
    for target in group:
        if type(target.holder) is nn.Linear:
            replace_module_(
                peft_model, target.holder, QuantLinear(quantized, target.holder.bias, dtype=dtype)
            )
        else:
            pack_parameter_(target.holder, target.key, quantized, transposed=target.transposed)
        target.layer.merge = _refuse_merge


def _refuse_merge(*arguments: Any, **named: Any) -> None:
    raise QuantError(
        "adapters cannot be merged into a packed base",
        "keep them apart, or initialize with packed=False",
    )


@torch.no_grad()
def _write_adapter_(target: _Target, adapter: str, result: LoftQResult) -> int:
    """Write the factors so that the layer's scaling times their product is LoftQ's; return their bytes."""
    layer, rank = target.layer, target.layer.r[adapter]
    root = math.sqrt(layer.scaling[adapter])
    # The components come by descending size: the leading ones are the best of their rank.
    lora_A, lora_B = result.lora_A[..., :rank, :] / root, result.lora_B[..., :rank] / root
    if target.kind == "embedding":
        stored_A, stored_B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        lora_A, lora_B = lora_B.T, lora_A.T
    else:
        stored_A, stored_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if lora_A.dim() == 3:
        # PEFT's layout of a stack: A (experts * rank, in), B (out, rank * experts) with the experts innermost.
        lora_A, lora_B = lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)
    stored_A.copy_(lora_A)
    stored_B.copy_(lora_B)
    if adapter in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[adapter]
        trained = magnitude.weight.requires_grad
        magnitude.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=stored_A,
            lora_B=stored_B,
            scaling=layer.scaling[adapter],
        )
        magnitude.weight.requires_grad_(trained)
    return stored_A.nbytes + stored_B.nbytes
