"""Adapters of packed layers from and to PEFT's files: `adapter_model.safetensors` and `adapter_config.json`."""

# ruff: noqa: N806 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quant.errors import QuantError
from quant.files import replace_file
from quant.linear import QuantLinear
from quant.lora_config import CONFIG_FILE, PREFIX, TENSORS_FILE, lora_config
from quant.parameters import PackedParameter
from quant.tree import replace_module_

PARAMETRIZED = ".parametrizations.weight.0"


def adapters_to_peft(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the adapters of a model's packed layers as PEFT stores them.

    They belong over the base that they were trained on: the dequantized one (`dequantize_linears_`), or the same
    codes in bitsandbytes (`quant.bridges.bitsandbytes.model_to_bitsandbytes_`).

    Args:
        model: With `QuantLinear` layers, or packed (in, out) weights such as Conv1D's.

    Returns:
        The tensors by PEFT's keys, which share memory with the layers', and the fields of the ``LoraConfig`` that
        fits them: different ranks and scalings are in ``rank_pattern`` and ``alpha_pattern``.

    Raises:
        QuantError: No packed layer has adapters, or one that is not a linear layer does.
    """
    layers = _adapted_layers(model)
    layers = {name: layer for name, layer in layers.items() if layer.rank}
    if not layers:
        raise QuantError(
            f"no packed layer of this {type(model).__name__} has adapters", "call loftq_model first"
        )
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_A, lora_B = layer.lora_A, layer.lora_B
        linear = isinstance(layer, QuantLinear) or (layer.transposed and len(layer.shape) == 2)
        if lora_A is None or lora_B is None or not linear or ".parametrizations." in name:
            raise QuantError(
                f"{name} has adapters, but is no linear layer and no Conv1D",
                "initialize stacked parameters through loftq_peft_ and target_parameters instead",
            )
        state[f"{PREFIX}{name}.lora_A.weight"] = lora_A.detach().contiguous()
        state[f"{PREFIX}{name}.lora_B.weight"] = lora_B.detach().contiguous()
    return state, _config(model, layers)


def adapters_from_peft_(
    model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> list[str]:
    """Give packed layers the adapters of a PEFT state dict, in place of those that they have.

    Layers that the state dict does not name keep theirs.

    Args:
        model: With `QuantLinear` layers, or packed (in, out) weights, at the names that the adapters have.
        state: What ``peft.get_peft_model_state_dict`` returns or `adapter_model.safetensors` holds.
        config: The fields of its ``LoraConfig``, as in `adapter_config.json`.

    Returns:
        The names of the layers that have adapters now.

    Raises:
        QuantError: A layer is missing or of another shape, or the adapters are not plain LoRA of linear layers;
            the model is left as it was.
    """
    layers = _adapted_layers(model)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if match is None:
            raise QuantError(
                f"the adapter holds {key}, which is no factor of a linear layer",
                "train plain LoRA of linear layers, without DoRA, biases or modules to save",
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in pairs.items():
        _check_pair(name, pair, layers.get(name))
    scalings = {name: _scaling(name, config) for name in pairs}
    for name, pair in pairs.items():
        layer = layers[name]
        device = layer.codes.device
        layer.lora_A = nn.Parameter(pair["lora_A"].detach().to(device, copy=True))
        layer.lora_B = nn.Parameter(pair["lora_B"].detach().to(device, copy=True))
        layer.scaling = scalings[name]
    return list(pairs)


def save_peft_adapters(model: nn.Module, folder: Path | str) -> None:
    """Write the adapters of a model's packed layers so that ``PeftModel.from_pretrained`` loads them.

    Args:
        model: As in `adapters_to_peft`.
        folder: Where `adapter_model.safetensors` and `adapter_config.json` go; created.

    Raises:
        QuantError: As in `adapters_to_peft`.
    """
    from safetensors.torch import save_file

    state, config = adapters_to_peft(model)
    # Tied layers share their factors, which a file cannot.
    state = {key: tensor.clone() for key, tensor in state.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    replace_file(folder / TENSORS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
    replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def load_peft_adapters_(model: nn.Module, folder: Path | str) -> list[str]:
    """Give packed layers the adapters that PEFT, or `save_peft_adapters`, has written; see `adapters_from_peft_`.

    Raises:
        QuantError: A file is missing or damaged, or as in `adapters_from_peft_`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for file in (TENSORS_FILE, CONFIG_FILE):
        if not (folder / file).is_file():
            raise QuantError(f"{folder} holds no {file}", "pass a folder of PeftModel.save_pretrained")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        state = load_file(folder / TENSORS_FILE)
    except (ValueError, SafetensorError) as error:
        raise QuantError(f"{folder} holds a damaged file: {error}", "save the adapters again") from error
    return adapters_from_peft_(model, state, config)


def dequantize_linears_(model: nn.Module) -> list[str]:
    """Replace every `QuantLinear` by an ``nn.Linear`` of its base weight, without its adapters, in place.

    Returns:
        The names of the layers replaced.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for layer in layers.values():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.quantized.dequantize(layer.dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        replace_module_(model, layer, linear)
    return list(layers)


def _adapted_layers(model: nn.Module) -> dict[str, QuantLinear | PackedParameter]:
    """Return the packed layers by the names that PEFT knows their modules by."""
    return {
        name.removesuffix(PARAMETRIZED): module
        for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, PackedParameter))
    }


def _config(model: nn.Module, layers: Mapping[str, QuantLinear | PackedParameter]) -> dict[str, Any]:
    return lora_config(
        {name: layer.rank for name, layer in layers.items()},
        {name: layer.scaling for name, layer in layers.items()},
        modules=[name for name, _ in model.named_modules()],
        fan_in_fan_out=all(isinstance(layer, PackedParameter) for layer in layers.values()),
        base=getattr(getattr(model, "config", None), "_name_or_path", None),
    )


def _scaling(name: str, config: Mapping[str, Any]) -> float:
    """Return the scaling that PEFT would give this layer."""
    if not {"r", "lora_alpha"} <= config.keys():
        raise QuantError("the adapter's configuration lacks r or lora_alpha", "pass that of a LoraConfig")
    rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_pair(name: str, pair: Mapping[str, Tensor], layer: QuantLinear | PackedParameter | None) -> None:
    if layer is None:
        raise QuantError(
            f"the adapter belongs to {name}, which is no packed layer here", "pack the same layers"
        )
    found = {key: tuple(factor.shape) for key, factor in pair.items()}
    rank = found.get("lora_A", (0,))[0]
    if len(layer.shape) != 2 or found != {"lora_A": (rank, layer.shape[1]), "lora_B": (layer.shape[0], rank)}:
        raise QuantError(
            f"the adapter of {name} has factors {found}, the layer the shape {layer.shape}",
            "load the adapters of the same model",
        )
