"""The weights of a model that LoftQ takes, each with all layers that share it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor, nn

from quant.affine import affine_layout
from quant.blockwise import check_weight
from quant.config import LoftQConfig
from quant.errors import QuantError
from quant.packed import PackedWeight
from quant.row_scale import computes_more, row_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeight:
    """The layers to quantize that hold one and the same weight; mostly a single one.

    Attributes:
        weight: (out_features, in_features).
        layers: By qualified name, in the order of the model.
    """

    weight: Tensor
    layers: dict[str, nn.Linear | nn.Embedding]

    @property
    def name(self) -> str:
        """Qualified name of the first layer."""
        return next(iter(self.layers))

    @property
    def embeds(self) -> bool:
        """Whether an embedding is among the layers."""
        return any(isinstance(layer, nn.Embedding) for layer in self.layers.values())


def shared_weights(model: nn.Module, config: LoftQConfig) -> list[SharedWeight]:
    """Return the weights to quantize, checked, in the order of the model.

    A weight that an embedding and a linear layer share is among them where there is an `embedding_format`.

    Args:
        model: Any module tree with real weights.
        config: Which layers.

    Raises:
        QuantError: There is none, or one cannot be quantized.
    """
    _check_unwrapped(model)
    shared: dict[int, SharedWeight] = {}
    for name, module in model.named_modules():
        if name and isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight
            shared.setdefault(id(weight), SharedWeight(weight=weight, layers={})).layers[name] = module
    groups = [taken for group in shared.values() if (taken := _taken(group, config)) is not None]
    if not groups:
        raise _nothing_to_do(model, config)
    for group in groups:
        _check(group)
    return groups


def _nothing_to_do(model: nn.Module, config: LoftQConfig) -> QuantError:
    kind = type(model).__name__
    if affine_layout(model) is not None:
        return QuantError(
            f"no linear layer lies below this {kind}, which is one itself and cannot be replaced in place",
            "pass what holds it, such as nn.Sequential(layer)",
        )
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and config.includes(name):
            return QuantError(
                f"no linear layer of this {kind} is left to quantize: {name or 'it'} is packed already",
                "train it as it is, or load the float model again to quantize it otherwise",
            )
    return QuantError(
        f"no linear layer of this {kind} is to be quantized",
        "widen `include`, narrow `exclude`, set `embedding_format` for tied weights, or call loftq_parameter_ for "
        "weights that no linear layer holds, such as stacked experts",
    )


def _taken(group: SharedWeight, config: LoftQConfig) -> SharedWeight | None:
    """Return those of the layers that are to be quantized, None if there are none."""
    if group.embeds:
        tied = any(isinstance(layer, nn.Linear) for layer in group.layers.values())
        packed = tied and config.embedding_format and not any(map(config.excludes, group.layers))
        return group if packed else None
    layers = {name: layer for name, layer in group.layers.items() if config.includes(name)}
    return SharedWeight(weight=group.weight, layers=layers) if layers else None


def _check_unwrapped(model: nn.Module) -> None:
    """Raise QuantError for layers that PEFT has wrapped: its factors are linear layers too, and would be packed."""
    # Whoever has wrapped a layer has imported PEFT; nobody else needs to.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in model.named_modules():
        if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
            raise QuantError(
                f"{name or 'the model'} is a layer of PEFT's with adapters of its own",
                "call quant.bridges.peft.loftq_peft_, or pass the model before get_peft_model",
            )


def _check(group: SharedWeight) -> None:
    for name, layer in group.layers.items():
        check_weight(layer.weight, f"{name}.weight")
        if isinstance(layer, nn.Embedding):
            row_scale(layer, name)
        elif type(layer).forward is not nn.Linear.forward:
            raise computes_more(name, layer, nn.Linear)
        elif layer.bias is not None:
            # Kept as it is, but one that is not finite would spoil all that the layer puts out.
            check_weight(layer.bias, f"{name}.bias")
