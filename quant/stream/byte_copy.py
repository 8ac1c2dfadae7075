"""A safetensors file put together from ranges of bytes in others, without a tensor in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from quant.errors import QuantError
from quant.stream.header import ITEM_SIZES, StoredTensor

CHUNK = 1 << 20


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file of tensors that lie in other files, bit for bit.

    Args:
        path: The file to write.
        tensors: What to write, by its new key.

    Raises:
        QuantError: A file changed meanwhile and ends too early.
    """
    # Wide elements first, as in safetensors' own writer: every tensor is then aligned to its elements.
    order = sorted(tensors, key=lambda key: (-ITEM_SIZES.get(tensors[key].dtype, 1), key))
    with path.open("wb") as output:
        output.write(_header(tensors, order))
        for key in order:
            with tensors[key].path.open("rb") as source:
                source.seek(tensors[key].start)
                _copy(source, output, tensors[key])


def split(tensors: Mapping[str, StoredTensor], most: int) -> list[dict[str, StoredTensor]]:
    """Cut tensors into runs, in their order, of at most `most` bytes each (a larger tensor by itself)."""
    shards: list[dict[str, StoredTensor]] = []
    room = 0
    for key, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = most
        shards[-1][key] = tensor
        room -= tensor.nbytes
    return shards


def _header(tensors: Mapping[str, StoredTensor], order: list[str]) -> bytes:
    entries, offset = {}, 0
    for key in order:
        tensor = tensors[key]
        stop = offset + tensor.nbytes
        entries[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, stop)}
        offset = stop
    # Readers of the field look for this entry to know how the tensors are laid out.
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, output: BinaryIO, tensor: StoredTensor) -> None:
    left = tensor.nbytes
    while left:
        piece = source.read(min(CHUNK, left))
        if not piece:
            raise QuantError(
                f"{tensor.path} ends before the last byte of {tensor.key}", "do not change it meanwhile"
            )
        output.write(piece)
        left -= len(piece)
