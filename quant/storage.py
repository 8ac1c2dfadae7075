"""The packed layers of a model on disk: tensors in `quant.safetensors`, what they are in `quant.json`."""

# ruff: noqa: N806 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.embedding import QuantEmbedding
from quant.errors import QuantError
from quant.files import import_safetensors, replace_file, sha256
from quant.format_mark import KEY as FORMAT_KEY
from quant.linear import QuantLinear
from quant.parameters import PackedParameter
from quant.quantized import PART_NAMES
from quant.stack import join_stack
from quant.stored import TERNARY, Packed, Slot, StoredLayer, describe, find_slot, packed_weights
from quant.ternary import PackedExperts, TernaryTensor
from quant.ternary.tensor import PART_NAMES as TERNARY_PARTS

SCHEMA = "graphprune.quant/1"
TENSORS_FILE, INDEX_FILE = "quant.safetensors", "quant.json"
REMEDY = "quantize the model again, with save_quantized or loftq_checkpoint, whichever wrote it"


def save_quantized(model: nn.Module, folder: Path | str) -> None:
    """Write all packed layers, parameters and experts of a model, bit for bit; shared tensors once.

    Args:
        model: Any module tree; what is not packed is not written.
        folder: Where `quant.safetensors` and `quant.json` go; created.

    Raises:
        QuantError: The model has no packed layer, or one on the meta device.
    """
    layers, tensors = _collect(model)
    if not layers:
        raise QuantError(f"this {type(model).__name__} has no packed layer", "call loftq_model first")
    absent = [key for key, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise QuantError(
            f"{absent[0]} is on the meta device and has no data", "load the packed weights first"
        )
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
    """Put the weights that `save_quantized` wrote into a model of the same shapes, in place.

    What was not packed (norms, embeddings, a head) stays the model's own: load it from where the model came from.

    Args:
        model: A tree with `nn.Linear` and `nn.Embedding` layers (float, or on the meta device) or packed ones
            at the names stored, and parameters where parameters were packed. What is new takes the device of the
            old, or the CPU in place of meta.
        folder: What `save_quantized` wrote.

    Raises:
        QuantError: A file is missing, damaged, or does not fit the model, which is then left as it was.
    """
    layers, tensors = _read(Path(folder))
    stacks = _stacks(model, layers)
    single = [name for name in layers if not any(name in members for members in stacks.values())]
    built: dict[str, tuple[Slot, Packed]] = {}
    for name in sorted(single, key=lambda name: (layers[name].tied_to is not None, name)):
        slot = find_slot(model, name, layers[name])
        owner = built.get(layers[name].tied_to or "", (None, None))[1]
        built[name] = slot, _build(name, layers[name], tensors, owner, slot)
    for name, members in stacks.items():
        built[name] = _build_stack(model, name, {member: layers[member] for member in members}, tensors)
    biases = {
        name: tensors.take(f"{name}.bias") for name, (slot, _) in built.items() if slot.holder is not None
    }
    if tensors.keys():
        raise QuantError(f"{TENSORS_FILE} holds {', '.join(tensors.keys()[:5])} of no layer", REMEDY)
    for name, (slot, packed) in built.items():
        slot.put(packed)
        bias = biases.get(name)
        if slot.holder is not None and bias is not None:
            slot.holder.register_parameter("bias", nn.Parameter(bias.to(slot.device), requires_grad=False))


def read_index(folder: Path) -> dict[str, Any]:
    """Return what `quant.json` of a folder says.

    Raises:
        QuantError: It is missing, damaged or of another schema.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise QuantError(
            f"{folder} holds no {TENSORS_FILE} with its {INDEX_FILE}",
            "pass a folder that save_quantized wrote",
        )
    try:
        index = dict(json.loads(path.read_text(encoding="utf-8")))
        schema = index["schema"]
    except (KeyError, TypeError, ValueError) as error:
        raise QuantError(f"{path} is damaged: {error!r}", REMEDY) from error
    if schema != SCHEMA:
        raise QuantError(f"{path} has the schema {schema!r}, not {SCHEMA!r}", REMEDY)
    return index


def check_hashes(folder: Path, hashes: Mapping[str, str], remedy: str) -> list[Path]:
    """Return the paths of the files that an index names.

    Raises:
        QuantError: One is missing or has another hash; with this remedy.
    """
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise QuantError(f"{folder} holds no {name}", remedy)
        if expected != sha256(folder / name):
            raise QuantError(f"{folder / name} is not the file that {INDEX_FILE} describes", remedy)
    return [folder / name for name in hashes]


def _collect(model: nn.Module) -> tuple[dict[str, StoredLayer], dict[str, Tensor]]:
    """Return the entries, and the tensors by key; a tensor that an earlier layer holds is left out."""
    layers: dict[str, StoredLayer] = {}
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    held: set[int] = set()
    for name, packed in packed_weights(model).items():
        owner = owners.setdefault(id(packed.get_buffer("codes")), name)
        layers[name] = describe(packed, None if owner == name else owner)
        for key, tensor in packed.state_dict(keep_vars=True).items():
            # The index says the format.
            if key != FORMAT_KEY and id(tensor) not in held:
                held.add(id(tensor))
                tensors[f"{name}.{key}"] = tensor.detach().contiguous()
    return layers, tensors


def _build(
    name: str, layer: StoredLayer, tensors: _StoredTensors, owner: Packed | None, slot: Slot
) -> Packed:
    """Return a packed weight for a slot, and take its tensors out of `tensors`."""

    def take(key: str) -> Tensor | None:
        tensor = tensors.take(f"{name}.{key}")
        return getattr(owner, key, None) if tensor is None else tensor.to(slot.device)

    names = TERNARY_PARTS if layer.format == TERNARY else PART_NAMES
    try:
        quantized = layer.tensor({key: part for key in names if (part := take(key)) is not None})
    except QuantError as error:
        raise QuantError(f"{TENSORS_FILE}, {name}: {error.problem}", REMEDY) from error
    if layer.kind == "experts" or isinstance(quantized, TernaryTensor):
        return PackedExperts(quantized, slot.dtype)
    if layer.kind == "embedding":
        return QuantEmbedding(quantized, slot.dtype, layer.scale)
    lora_A, lora_B = (take("lora_A"), take("lora_B")) if layer.rank else (None, None)
    found = 0 if lora_A is None else lora_A.shape[-2]
    if found != layer.rank:
        raise QuantError(f"the adapters of {name} have rank {found}, not {layer.rank}", REMEDY)
    if layer.kind == "parameter" or slot.holder is not None:
        return PackedParameter(quantized, lora_A, lora_B, layer.scaling, layer.transposed, slot.dtype)
    bias = tensors.take(f"{name}.bias")
    bias = None if bias is None else bias.to(slot.device)
    return QuantLinear(quantized, bias, lora_A, lora_B, layer.scaling, slot.dtype, layer.transposed)


def _stacks(model: nn.Module, layers: Mapping[str, StoredLayer]) -> dict[str, list[str]]:
    """Return the stacks whose matrices were stored one by one: parameters of a model, and the layers of each."""
    modules = dict(model.named_modules())
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 3}
    found: dict[str, list[str]] = {}
    for name, layer in layers.items():
        stack, _, index = name.rpartition(".")
        if layer.kind == "linear" and name not in modules and stack in parameters and index.isdecimal():
            found.setdefault(stack, []).append(name)
    for stack, members in found.items():
        wanted = [f"{stack}.{index}" for index in range(len(parameters[stack]))]
        if sorted(members) != sorted(wanted):
            raise QuantError(
                f"{stack} is a stack of {len(wanted)} in the model, of which {len(members)} are stored",
                "build the model with the shapes that were saved",
            )
        found[stack] = wanted
    return found


def _build_stack(
    model: nn.Module, name: str, members: Mapping[str, StoredLayer], tensors: _StoredTensors
) -> tuple[Slot, Packed]:
    """Return one packed parameter of matrices that were stored one by one, and its slot."""
    layer = next(iter(members.values()))
    whole = replace(layer, kind="parameter", shape=(len(members), *layer.shape))
    slot = find_slot(model, name, whole)
    parts = [_build(member, members[member], tensors, None, slot) for member in members]
    linears = [part for part in parts if isinstance(part, QuantLinear)]
    quantized = join_stack([part.quantized for part in linears])
    factors = [(part.lora_A, part.lora_B) for part in linears]
    lora_A, lora_B = (
        torch.stack([factor.detach() for factor in side if factor is not None]) if layer.rank else None
        for side in zip(*factors, strict=True)
    )
    return slot, PackedParameter(quantized, lora_A, lora_B, layer.scaling, dtype=slot.dtype)


def _read(folder: Path) -> tuple[dict[str, StoredLayer], _StoredTensors]:
    """Return entries and tensors of a folder whose hashes are right."""
    index = read_index(folder)
    try:
        hashes = index["sha256"]
        # One hash for `quant.safetensors`, or a hash for each of several files.
        files = dict(hashes) if isinstance(hashes, dict) else {TENSORS_FILE: str(hashes)}
        layers = {name: StoredLayer.from_entry(entry) for name, entry in index["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuantError(f"{folder / INDEX_FILE} is damaged: {error!r}", REMEDY) from error
    return layers, _StoredTensors(check_hashes(folder, files, REMEDY))


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
