"""Where a model, a text or a file is: told at once, before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graphprune.errors import SourceError
from graphprune.source.demo import DEMO, demo_folder

TEXT_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: For people: what the user asked for.
        location: A folder, or a hub id.
        is_local: Whether `location` is a folder.
    """

    name: str
    location: str
    is_local: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files; 0 for a hub id that is not a folder."""
        if not self.is_local:
            return 0
        return sum(file.stat().st_size for file in Path(self.location).glob("*.safetensors"))


def find_model(reference: str, base: Path | None = None) -> ModelSource:
    """Resolve what the user calls a model.

    Args:
        reference: ``demo``, a path to a transformers folder, or a hub id such as ``owner/name``.
        base: Where else to look for the folder, such as the recipe's own.

    Raises:
        SourceError: If there is no such folder, or it lacks a config or safetensors weights.
    """
    if reference == DEMO:
        return ModelSource("SmolLM2-135M-Instruct", str(demo_folder()), True)
    folder = place_of(reference, base)
    if folder.is_dir():
        _check_folder(folder)
        return ModelSource(folder.name, str(folder), True)
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
        return ModelSource(reference, reference, False)
    raise SourceError(
        f"there is no model '{reference}'",
        "give a transformers folder, a hub id such as owner/name, or 'demo'",
    )


def check_model(reference: str, base: Path) -> None:
    """Tell whether there is such a model, and fetch none.

    Args:
        reference: As `find_model` takes it, or a ``.onnx`` file.
        base: Where else to look, such as the recipe's folder.

    Raises:
        SourceError: If there is none.
    """
    if reference.endswith(".onnx"):
        find_file(reference, base, "model")
    elif reference != DEMO:
        find_model(reference, base)


def find_file(reference: str, base: Path, what: str) -> Path:
    """Return the place of a file, which is `what` for people.

    Raises:
        SourceError: If there is none.
    """
    path = place_of(reference, base)
    if not path.is_file():
        raise SourceError(f"there is no {what} '{reference}'", "give the path of a file")
    return path


def find_text(reference: str, base: Path | None) -> Path | None:
    """Return the file that the name of a text means, or None if it names a hub data set.

    Args:
        reference: A file, or a hub data set as ``owner/name`` or ``owner/name:split``.
        base: Where else to look for the file.

    Raises:
        SourceError: If it looks like a file, and there is none.
    """
    path = place_of(reference, base)
    if path.is_file():
        return path
    looks_local = reference.endswith(TEXT_SUFFIXES) or reference.startswith((".", "/", "~"))
    if looks_local or reference.count("/") != 1:
        raise SourceError(
            f"there is no text '{reference}'",
            f"give a file ({', '.join(TEXT_SUFFIXES)}) or a hub data set",
        )
    return None


def place_of(reference: str, base: Path | None = None) -> Path:
    """Return where a path leads: from here, or else from `base`, where it leads to something there."""
    path = Path(reference).expanduser()
    if base is not None and not path.exists() and (base / path).exists():
        path = base / path
    return path.resolve()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json", "give a folder that save_pretrained wrote")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise SourceError(
            f"{folder} has no safetensors weights",
            "convert them with model.save_pretrained(folder); pickled weights are not read",
        )
