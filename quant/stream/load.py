"""A result of `loftq_checkpoint` put into a model, which may be on the meta device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from quant.errors import QuantError
from quant.storage import INDEX_FILE, check_hashes, load_quantized_, read_index
from quant.stream.assemble import REST_FILE, REST_HASHES
from quant.stream.header import Header, read_header

REMEDY = (
    f"pass a folder that loftq_checkpoint wrote; to write it anew, delete its {INDEX_FILE} and run that again"
)


def load_checkpoint_(model: nn.Module, folder: Path | str) -> list[str]:
    """Put packed layers and all other tensors of a result into a model, in place; shared ones stay shared.

    Args:
        model: A model of the checkpoint's architecture, in float or with parameters on the meta device: those
            become real on the CPU, without the float weight of a packed layer ever being there. Each tensor
            takes dtype and device of the one it replaces.
        folder: What `loftq_checkpoint` wrote.

    Returns:
        Keys of the checkpoint for which the model has no place.

    Raises:
        QuantError: Files are missing or damaged or shapes differ, and the model is as it was; or it has
            tensors on the meta device that the checkpoint does not hold, and all others are loaded.
    """
    headers = [read_header(path) for path in _rest_files(Path(folder))]
    _check_shapes(model, headers)
    load_quantized_(model, folder)
    places = _places(model)
    strange: list[str] = []
    for header in headers:
        strange += _load_file(header, places)
    _tie(model)
    _check_complete(model)
    return strange


def _rest_files(folder: Path) -> list[Path]:
    """Return the files of the tensors in no packed layer, whose hashes are right."""
    hashes = read_index(folder).get(REST_HASHES)
    if not isinstance(hashes, dict):
        raise QuantError(f"{folder / INDEX_FILE} does not say what {REST_FILE} was", REMEDY)
    return check_hashes(folder, hashes, REMEDY)


def _check_shapes(model: nn.Module, headers: list[Header]) -> None:
    found = _tensors(model)
    for header in headers:
        for key, stored in header.tensors.items():
            if key in found and tuple(found[key].shape) != stored.shape:
                raise QuantError(
                    f"{key} has the shape {tuple(found[key].shape)} in the model, and {stored.shape} in {stored.path}",
                    "build the model from the configuration beside the checkpoint",
                )


def _load_file(header: Header, places: dict[str, list[tuple[nn.Module, str]]]) -> list[str]:
    """Load the tensors of a file and return the keys without a place."""
    from safetensors import safe_open

    strange = []
    for key, stored in header.tensors.items():
        if key not in places:
            strange.append(key)
            continue
        with safe_open(stored.path, framework="pt") as file:
            _replace(file.get_tensor(key), places[key])
    return strange


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return for each tensor's name all modules that hold this very tensor, with its name there."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            owners.setdefault(id(tensor), []).append((module, name))
    return {name: owners[id(tensor)] for name, tensor in _tensors(model).items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _replace(stored: Tensor, places: list[tuple[nn.Module, str]]) -> None:
    old = getattr(*places[0])
    device = torch.device("cpu") if old.is_meta else old.device
    # A copy in any case: the file stays mapped no longer than it takes to read this tensor.
    new = stored.to(device=device, dtype=old.dtype, copy=True)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module, name in places:
        setattr(module, name, new)


def _tie(model: nn.Module) -> None:
    """Let a model that knows its tied weights share them, if it was built without."""
    tie = getattr(model, "tie_weights", None)
    if callable(tie) and any(tensor.is_meta for tensor in model.parameters()):
        tie()


def _check_complete(model: nn.Module) -> None:
    left = [name for name, tensor in _tensors(model).items() if tensor.is_meta]
    if left:
        raise QuantError(
            "on the meta device still, and not in the checkpoint: "
            f"{', '.join(left[:5])}{' and others' if len(left) > 5 else ''}",
            "build the model with its parameters alone on meta, such as under accelerate.init_empty_weights(), "
            "or set these now: all others are loaded",
        )
