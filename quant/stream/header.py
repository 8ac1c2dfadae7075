"""The header of a safetensors file: which bytes are which tensor, without reading any of them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import QuantError

LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
REMEDY = "fetch or write the file again"
ITEM_SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
"""Bytes of an element; other dtypes have one byte or less, and need no alignment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as a range of bytes in a file.

    Attributes:
        path: The file.
        key: Its name in the file.
        dtype: As safetensors writes it, such as "BF16".
        shape: Its shape.
        start: The first of its bytes in the file.
        nbytes: How many there are.
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the beginning of a safetensors file says.

    Attributes:
        tensors: By key, in the order of the header.
        metadata: Text by name.
        sha256: Of the header's bytes.
        size: Bytes of the whole file.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    sha256: str
    size: int


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check that the file holds every byte it tells of.

    Raises:
        QuantError: The file is missing, cut short, or not of this format.

    Source: https://github.com/huggingface/safetensors#format
    """
    if not path.is_file():
        raise QuantError(f"{path} is missing", REMEDY)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(LARGEST_HEADER, size) else b""
    try:
        entries = json.loads(text)
        metadata = dict(entries.pop("__metadata__", {}))
        tensors = {key: _tensor(path, key, entry, 8 + length) for key, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise QuantError(f"{path} is damaged: its header cannot be read", REMEDY) from error
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise QuantError(f"{path} is damaged: it has {size} bytes, and its header tells of {end}", REMEDY)
    return Header(tensors=tensors, metadata=metadata, sha256=hashlib.sha256(text).hexdigest(), size=size)


def _tensor(path: Path, key: str, entry: dict[str, Any], data: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
    nbytes = int(stop) - int(start)
    expected = math.prod(shape) * ITEM_SIZES[dtype] if dtype in ITEM_SIZES else nbytes
    if start < 0 or nbytes < 0 or nbytes != expected:
        raise ValueError(f"{key}: {nbytes} bytes for {dtype} {shape}")
    return StoredTensor(path=path, key=key, dtype=dtype, shape=shape, start=data + int(start), nbytes=nbytes)
