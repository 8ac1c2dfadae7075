"""Writing files so that a reader finds the old one or the new one, whole, and never half of either."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    Works for a file and for a folder. If the block raises, `path` is as it was and the temporary is gone.

    Args:
        path: The final name; its parent is created.

    Yields:
        The path to write to. Its suffix is that of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            remove(path)
        else:
            _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove_temporaries(folder: Path) -> None:
    """Remove what `replacing` left below a folder when its process was killed; nobody else may be writing there."""
    for path in list(folder.rglob(".[0-9]*.*")):
        if path.name.split(".")[1].isdigit():
            remove(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys to `path`, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def remove(path: Path) -> None:
    """Remove a file or a folder tree; a path that is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
