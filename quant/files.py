"""Files that are written whole or not at all, their hashes, and the optional package that reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from quant.errors import QuantError


def import_safetensors() -> Any:
    """Return the module `safetensors.torch`; QuantError says how to install it where it is missing."""
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise QuantError("packed layers are stored as safetensors", "pip install safetensors") from error


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename: a reader finds the old file or the new one, whole."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the hash of a file, which is read in small pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
