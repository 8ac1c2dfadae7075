"""What a person names when an ONNX model is to be used or checked: a run folder, the folder in it, or a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graphprune.errors import SourceError
from graphprune.export.filenames import FILE
from graphprune.recipe import Recipe
from graphprune.recipe_file import load_recipe

_REMEDY = "give a run folder, a folder that holds model.onnx, or a .onnx file"


@dataclass(frozen=True)
class Exported:
    """An ONNX model, and the run that made it.

    Attributes:
        file: The .onnx file.
        run: The run folder; None if the file was named by itself.
    """

    file: Path
    run: Path | None

    @cached_property
    def recipe(self) -> Recipe | None:
        """The run's recipe."""
        return None if self.run is None else load_recipe(self.run / "recipe.yaml")

    @cached_property
    def base(self) -> Path | None:
        """The folder that the run's relative paths may start from."""
        if self.run is None:
            return None
        folder = _read(self.run / "run.json").get("measured", {}).get("recipe_folder")
        return None if folder is None else Path(folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the file.

        Raises:
            SourceError: If there is none.
        """
        from graphprune.source.location import ModelSource
        from graphprune.source.model import load_tokenizer

        folder = self.file.parent
        return load_tokenizer(ModelSource(folder.name, str(folder), True))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What genai_config.json says of the model; nothing if it is not there."""
        path = self.file.with_name("genai_config.json")
        return dict(_read(path).get("model", {})) if path.is_file() else {}

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ends = self.settings.get("eos_token_id", self.tokenizer.eos_token_id)
        return () if ends is None else tuple(ends) if isinstance(ends, list) else (int(ends),)

    @property
    def context_length(self) -> int | None:
        """Most tokens that the model was made for; None if nobody knows."""
        length = self.settings.get("context_length")
        return None if length is None else int(length)


def find_exported(reference: Path) -> Exported:
    """Find the ONNX model that a path means.

    Raises:
        SourceError: If there is none.
    """
    if reference.is_file() and reference.suffix == ".onnx":
        return Exported(reference, None)
    if (reference / FILE).is_file():
        return Exported(reference / FILE, None)
    if (reference / "onnx" / FILE).is_file():
        return Exported(reference / "onnx" / FILE, reference if (reference / "run.json").is_file() else None)
    if (reference / "onnx.unverified").is_dir():
        raise SourceError(
            f"the ONNX model of {reference} did not pass its verification",
            f"it is in {reference / 'onnx.unverified'}; run the recipe again, or name that folder to look at it",
        )
    if (reference / "run.json").is_file():
        raise SourceError(f"the run {reference} has no ONNX model yet", "finish it with graphprune run")
    raise SourceError(f"there is no ONNX model at {reference}", _REMEDY)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}", "export the model again") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} does not hold an object", "export the model again")
    return content
