"""The packed layers of a model on disk: tensors in `quant.safetensors`, what they are in `quant.json`."""

# ruff: noqa: N806 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.embedding import QuantEmbedding
from quant.errors import QuantError
from quant.files import import_safetensors, replace_file, sha256
from quant.linear import QuantLinear
from quant.packed import PackedWeight
from quant.parameters import PackedParameter
from quant.quantized import PART_NAMES, QuantizedTensor
from quant.ternary import PackedExperts
from quant.tree import replace_module_

SCHEMA = "graphprune.quant/1"
TENSORS_FILE, INDEX_FILE = "quant.safetensors", "quant.json"
REMEDY = "quantize the model again and save it with save_quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """One entry of `quant.json`.

    Attributes:
        kind: "linear" or "embedding".
        format: Name of the format.
        block_size: Consecutive weights that share a scale.
        shape: Shape of the weight.
        rank: Rank of the adapters, 0 without any.
        scaling: Factor of the adapters' product.
        tied_to: The layer that holds the tensors which this one lacks in the file, since both share them.
    """

    kind: str
    format: str
    block_size: int
    shape: tuple[int, ...]
    rank: int
    scaling: float
    tied_to: str | None = None

    def entry(self) -> dict[str, Any]:
        """Return the entry as JSON holds it."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> StoredLayer:
        """Return the layer of a JSON entry; KeyError, TypeError or ValueError where it is malformed."""
        return cls(
            kind=str(entry["kind"]),
            format=str(entry["format"]),
            block_size=int(entry["block_size"]),
            shape=tuple(int(size) for size in entry["shape"]),
            rank=int(entry["rank"]),
            scaling=float(entry["scaling"]),
            tied_to=entry.get("tied_to"),
        )


def save_quantized(model: nn.Module, folder: Path | str) -> None:
    """Write all `QuantLinear` and `QuantEmbedding` layers of a model, bit for bit; shared tensors once.

    Args:
        model: Any module tree; its other layers are not written.
        folder: Where `quant.safetensors` and `quant.json` go; created.

    Raises:
        QuantError: The model has no packed layer.
    """
    _check_all_are_stored(model)
    layers, tensors = _collect(model)
    if not layers:
        raise QuantError(f"this {type(model).__name__} has no packed layer", "call loftq_model first")
    folder = Path(folder)
    save_file = import_safetensors().save_file
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TENSORS_FILE, lambda path: save_file(tensors, path))
    index = {
        "schema": SCHEMA,
        "layers": {name: layer.entry() for name, layer in layers.items()},
        "sha256": sha256(folder / TENSORS_FILE),
    }
    text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # The index comes last: an old one beside new tensors is found out by the hash.
    replace_file(folder / INDEX_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def load_quantized_(model: nn.Module, folder: Path | str) -> None:
    """Put the layers that `save_quantized` wrote into a model of the same shapes, in place.

    Args:
        model: A tree with `nn.Linear` and `nn.Embedding` layers (float, or on the meta device) or packed ones
            at the names stored. The new layers take the device of the old, or the CPU in place of meta.
        folder: What `save_quantized` wrote.

    Raises:
        QuantError: A file is missing, damaged, or does not fit the model, which is then left as it was.
    """
    layers, tensors = _read(Path(folder))
    modules = dict(model.named_modules(remove_duplicate=False))
    built: dict[str, PackedWeight] = {}
    for name in sorted(layers, key=lambda name: (layers[name].tied_to is not None, name)):
        old = modules.get(name)
        if old is None or _kind_and_shape(old) != (layers[name].kind, layers[name].shape):
            found = "nothing" if old is None else f"a {type(old).__name__} of shape {_kind_and_shape(old)[1]}"
            raise QuantError(
                f"{name} is {found} in the model, but a stored {layers[name].kind} {layers[name].shape}",
                "build the model with the shapes that were saved",
            )
        built[name] = _build(name, layers[name], tensors, built, old)
    if tensors.keys():
        raise QuantError(f"{TENSORS_FILE} holds {', '.join(tensors.keys()[:5])} of no layer", REMEDY)
    for name, new in built.items():
        replace_module_(model, modules[name], new)


def _collect(model: nn.Module) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    """Return the entries, and the tensors by key; a tensor that an earlier layer holds is left out."""
    layers: dict[str, StoredLayer] = {}
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    held: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, (QuantLinear, QuantEmbedding)):
            continue
        owner = owners.setdefault(id(module.codes), name)
        linear = module if isinstance(module, QuantLinear) else None
        layers[name] = StoredLayer(
            kind="linear" if linear else "embedding",
            format=module.format,
            block_size=module.block_size,
            shape=module.shape,
            rank=linear.rank if linear else 0,
            scaling=linear.scaling if linear else 1.0,
            tied_to=None if owner == name else owner,
        )
        for key, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in held:
                held.add(id(tensor))
                tensors[f"{name}.{key}"] = tensor.detach().contiguous()
    return layers, tensors


def _build(
    name: str, layer: StoredLayer, tensors: _StoredTensors, built: dict[str, PackedWeight], old: nn.Module
) -> PackedWeight:
    """Return the packed layer that replaces `old`, and take its tensors out of `tensors`."""
    device, dtype = _placement(old)
    owner = built.get(layer.tied_to) if layer.tied_to is not None else None

    def take(key: str) -> Tensor | None:
        tensor = tensors.take(f"{name}.{key}")
        return getattr(owner, key, None) if tensor is None else tensor.to(device)

    parts = {key: part for key in PART_NAMES if (part := take(key)) is not None}
    try:
        quantized = QuantizedTensor.from_parts(
            parts, shape=layer.shape, format=layer.format, block_size=layer.block_size
        )
    except QuantError as error:
        raise QuantError(f"{TENSORS_FILE}, {name}: {error.problem}", REMEDY) from error
    if layer.kind == "embedding":
        return QuantEmbedding(quantized, dtype)
    lora_A, lora_B = (take("lora_A"), take("lora_B")) if layer.rank else (None, None)
    bias = tensors.take(f"{name}.bias")
    bias = None if bias is None else bias.to(device)
    linear = QuantLinear(quantized, bias, lora_A, lora_B, layer.scaling, dtype)
    if linear.rank != layer.rank:
        raise QuantError(f"the adapters of {name} have rank {linear.rank}, not {layer.rank}", REMEDY)
    return linear


def _kind_and_shape(module: nn.Module) -> tuple[str, tuple[int, ...]]:
    kind = "embedding" if isinstance(module, (QuantEmbedding, nn.Embedding)) else "linear"
    if isinstance(module, PackedWeight):
        return kind, module.shape
    return kind, tuple(module.weight.shape) if isinstance(module, (nn.Linear, nn.Embedding)) else ()


def _placement(old: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of a layer to replace; the CPU for meta, where nothing can be kept."""
    weight = old._dtype_mark if isinstance(old, PackedWeight) else next(old.parameters())
    return torch.device("cpu") if weight.is_meta else weight.device, weight.dtype


def _read(folder: Path) -> tuple[dict[str, StoredLayer], _StoredTensors]:
    """Return entries and tensors of a folder whose hashes are right."""
    if not (folder / INDEX_FILE).is_file():
        raise QuantError(
            f"{folder} holds no {TENSORS_FILE} with its {INDEX_FILE}",
            "pass a folder that save_quantized wrote",
        )
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        schema, hashes = index["schema"], index["sha256"]
        # One hash for `quant.safetensors`, or a hash for each of several files.
        files = dict(hashes) if isinstance(hashes, dict) else {TENSORS_FILE: str(hashes)}
        layers = {name: StoredLayer.from_entry(entry) for name, entry in index["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuantError(f"{folder / INDEX_FILE} is damaged: {error!r}", REMEDY) from error
    if schema != SCHEMA:
        raise QuantError(f"{folder / INDEX_FILE} has the schema {schema!r}, not {SCHEMA!r}", REMEDY)
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise QuantError(f"{folder} holds no {name}", "pass a folder that save_quantized wrote")
        if expected != sha256(folder / name):
            raise QuantError(f"{folder / name} is not the file that {INDEX_FILE} describes", REMEDY)
    return layers, _StoredTensors(folder / name for name in files)


class _StoredTensors:
    """The tensors of some files, read when they are taken, so that never all are in memory beside the model's."""

    def __init__(self, paths: Iterable[Path]) -> None:
        import_safetensors()
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise QuantError(f"{path} is damaged: {error!r}", REMEDY) from error

    def keys(self) -> list[str]:
        """Return the names of the tensors not yet taken."""
        return sorted(self._files)

    def take(self, key: str) -> Tensor | None:
        """Return a tensor and forget it, or None where there is none."""
        from safetensors import safe_open

        path = self._files.pop(key, None)
        if path is None:
            return None
        with safe_open(path, framework="pt") as file:
            # A copy: the file stays mapped no longer than it takes to read this tensor.
            return file.get_tensor(key).clone()


def _check_all_are_stored(model: nn.Module) -> None:
    """Raise QuantError for packed weights that are no layer's of ours and would be lost."""
    for name, module in model.named_modules():
        if isinstance(module, (PackedParameter, PackedExperts)):
            raise QuantError(
                f"{name} is a packed parameter, which this file format does not hold",
                "save model.state_dict() with safetensors, and load it into a model packed alike",
            )
