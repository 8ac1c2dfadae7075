"""A folder of safetensors weights in the layout of transformers, of which one tensor at a time is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.files import import_safetensors
from quant.stream.header import Header, StoredTensor, read_header

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weights of a folder, unread.

    Attributes:
        folder: Where they are.
        tensors: By key; the files in the order of their names, the keys in the order of the files.
        headers: By the file's name.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    headers: dict[str, Header]

    def identity(self) -> dict[str, Any]:
        """Return what tells these files from others, without reading them: JSON values."""
        return {
            name: {
                "size": header.size,
                "header_sha256": header.sha256,
                "mtime_ns": (self.folder / name).stat().st_mtime_ns,
            }
            for name, header in self.headers.items()
        }


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint and check that all files and tensors are there.

    Args:
        folder: With `model.safetensors`, or `model.safetensors.index.json` and the files it names.

    Raises:
        QuantError: A file or a tensor is missing or damaged, or the weights are quantized already.
    """
    _check_not_quantized(folder)
    weight_map = _weight_map(folder)
    names = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
    headers = {name: read_header(folder / name) for name in names}
    found = {key: tensor for header in headers.values() for key, tensor in header.tensors.items()}
    missing = [key for key, name in (weight_map or {}).items() if key not in headers[name].tensors]
    if missing:
        raise QuantError(
            f"{folder} lacks {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}, "
            f"which {INDEX_FILE} promises",
            "fetch the checkpoint again",
        )
    return Checkpoint(folder=folder, tensors=found, headers=headers)


def read_matrix(stored: StoredTensor, index: int | None = None) -> Tensor:
    """Read one matrix in float32, or one of a stack of them.

    The file is mapped for this one tensor only: mapped pages count as this process's memory until then.

    Args:
        stored: F32, F16 or BF16.
        index: Which matrix of a stack.
    """
    import_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(stored.path, framework="pt") as file:
            matrix = file.get_tensor(stored.key) if index is None else file.get_slice(stored.key)[index]
            # A copy in any case: what is mapped must not outlive the file.
            return matrix.to(torch.float32, copy=True)
    except (SafetensorError, OSError) as error:
        raise QuantError(
            f"{stored.path}: {stored.key} cannot be read: {error}", "fetch the file again"
        ) from error


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Return the file of each key, or None for a checkpoint of a single file."""
    if (folder / SINGLE_FILE).is_file():
        return None
    index = folder / INDEX_FILE
    if not index.is_file():
        raise QuantError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
            "pass a folder that save_pretrained wrote; other kinds of files are not read",
        )
    try:
        weight_map = {
            str(key): str(name) for key, name in json.loads(index.read_text("utf-8"))["weight_map"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise QuantError(f"{index} is damaged: {error!r}", "fetch it again") from error
    strange = [name for name in weight_map.values() if Path(name).name != name]
    if strange or not weight_map:
        raise QuantError(f"{index} names {strange[0] if strange else 'no file'}", "fetch it again")
    return weight_map


def _check_not_quantized(folder: Path) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise QuantError(f"{path} is damaged: {error}", "fetch it again") from error
    if isinstance(config, dict) and config.get("quantization_config"):
        raise QuantError(f"the weights of {folder} are quantized already", "pass the original checkpoint")
