"""What a person adds from the command line: files that register rules, saliencies, methods, costs or formats.

A recipe names none of them, so that a recipe from elsewhere never runs code.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from graphprune.errors import RecipeError

_loaded: dict[str, bytes] = {}


def load_extension(name: str) -> None:
    """Import an extension, once.

    Args:
        name: The path of a .py file, or the name of a module that Python finds.

    Raises:
        RecipeError: If there is none, or it raises an error.
    """
    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise RecipeError(f"--extension {name}: there is no such file", "give a .py file, or a module's name")
    try:
        module = _import_file(path) if is_file else importlib.import_module(name)
    except Exception as error:  # whatever a person's own code raises
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        own = [frame for frame in frames if is_file and Path(frame.filename) == path.resolve()]
        line = f", line {own[-1].lineno}" if own else ""
        if isinstance(error, SyntaxError) and error.lineno is not None:
            line = f", line {error.lineno}"
        raise RecipeError(
            f"--extension {name}{line}: {type(error).__name__}: {error}",
            "give a .py file that can be imported, or the name of a module that Python finds",
        ) from error
    source = getattr(module, "__file__", None)
    _loaded[name] = hashlib.sha256(Path(source).read_bytes()).digest() if source else b""


def extension_names() -> Sequence[str]:
    """Return the extensions that were loaded, as they were named."""
    return tuple(_loaded)


def extension_digests() -> Sequence[bytes]:
    """Return a hash of each extension's file: what was computed with another one is not to be reused."""
    return tuple(_loaded.values())


def _import_file(path: Path) -> ModuleType:
    name = f"graphprune_extension_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
