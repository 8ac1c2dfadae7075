"""The packed layers of a model on disk: tensors in `quant.safetensors`, what they are in `quant.json`."""

# ruff: noqa: N806 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.blockwise import PART_NAMES, QuantizedTensor
from quant.embedding import QuantEmbedding
from quant.errors import QuantError
from quant.linear import QuantLinear
from quant.packed import PackedWeight
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
    layers, tensors = _collect(model)
    if not layers:
        raise QuantError(f"this {type(model).__name__} has no packed layer", "call loftq_model first")
    folder = Path(folder)
    save_file = _safetensors().save_file
    folder.mkdir(parents=True, exist_ok=True)
    _replace_file(folder / TENSORS_FILE, lambda path: save_file(tensors, path))
    index = {
        "schema": SCHEMA,
        "layers": {name: layer.entry() for name, layer in layers.items()},
        "sha256": _sha256(folder / TENSORS_FILE),
    }
    text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # The index comes last: an old one beside new tensors is found out by the hash.
    _replace_file(folder / INDEX_FILE, lambda path: path.write_text(text, encoding="utf-8"))


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
    if tensors:
        raise QuantError(f"{TENSORS_FILE} holds {', '.join(sorted(tensors)[:5])} of no layer", REMEDY)
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
    name: str, layer: StoredLayer, tensors: dict[str, Tensor], built: dict[str, PackedWeight], old: nn.Module
) -> PackedWeight:
    """Return the packed layer that replaces `old`, and take its tensors out of `tensors`."""
    device, dtype = _placement(old)
    owner = built.get(layer.tied_to) if layer.tied_to is not None else None

    def take(key: str) -> Tensor | None:
        tensor = tensors.pop(f"{name}.{key}", None)
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
    bias = tensors.pop(f"{name}.bias", None)
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


def _read(folder: Path) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    """Return entries and tensors of a folder whose hash is right."""
    for file in (TENSORS_FILE, INDEX_FILE):
        if not (folder / file).is_file():
            raise QuantError(f"{folder} holds no {file}", "pass a folder that save_quantized wrote")
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        schema, sha256 = index["schema"], index["sha256"]
        layers = {name: StoredLayer.from_entry(entry) for name, entry in index["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuantError(f"{folder / INDEX_FILE} is damaged: {error!r}", REMEDY) from error
    if schema != SCHEMA:
        raise QuantError(f"{folder / INDEX_FILE} has the schema {schema!r}, not {SCHEMA!r}", REMEDY)
    if sha256 != _sha256(folder / TENSORS_FILE):
        raise QuantError(f"{folder / TENSORS_FILE} is not the file that {INDEX_FILE} describes", REMEDY)
    load_file = _safetensors().load_file
    try:
        return layers, load_file(folder / TENSORS_FILE)
    except import_module("safetensors").SafetensorError as error:
        raise QuantError(f"{folder / TENSORS_FILE} is damaged: {error!r}", REMEDY) from error


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise QuantError("packed layers are stored as safetensors", "pip install safetensors") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename: a reader finds the old file or the new one, whole."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
