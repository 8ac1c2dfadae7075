"""What each stage reads: one that is done stays done for as long as that is the same.

All stages read the start: the model, the text, the seed, and how the model is pruned. A folder belongs to one start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from graphprune.extensions import extension_digests
from graphprune.recipe import Recipe

LATER = ("quantize", "recover", "export", "report")
"""Sections of a recipe that no stage up to the pruned model reads, but for the dense model's prompts."""

_READS: Mapping[str, tuple[str, ...]] = {
    "evaluate": ("report",),
    "quantize": ("quantize",),
    "recover": ("quantize", "recover"),
    "export": ("quantize", "recover", "export"),
    "speed": ("quantize", "recover", "export", "report"),
}
# The other way round where adapters are trained on the float model.
_READS_ON_PRUNED = {**_READS, "quantize": ("quantize", "recover"), "recover": ("recover",)}
_READS_OF_ONNX = {
    "evaluate": ("report",),
    "export": ("quantize", "export"),
    "speed": ("quantize", "export", "report"),
}


def start_digest(recipe: Recipe, *further: str | bytes) -> str:
    """Return a hash of what all stages read, and of what extends them.

    Args:
        recipe: The recipe.
        further: What it names, such as texts.
    """
    return _digest(recipe.model_dump(mode="json", exclude=set(LATER)), (*further, *extension_digests()))


def section_digest(recipe: Recipe, section: str, *further: str | bytes) -> str:
    """Return a hash of one of the `LATER` sections and of what it names."""
    return _digest(recipe.model_dump(mode="json", include={section}), further)


def stage_stamps(
    recipe: Recipe, start: str, sections: Mapping[str, str], stages: Iterable[str]
) -> dict[str, str]:
    """Return a hash of all that each stage reads, its own inputs from earlier stages included.

    Args:
        recipe: The recipe.
        start: From `start_digest`.
        sections: From `section_digest`, by name.
        stages: Names of the stages.
    """
    reads = _READS_ON_PRUNED if recipe.recover.base == "pruned" else _READS
    reads = _READS_OF_ONNX if recipe.model.is_onnx else reads
    return {
        stage: _digest([start, *(sections[section] for section in reads.get(stage, ()))]) for stage in stages
    }


def _digest(described: object, further: Iterable[str | bytes] = ()) -> str:
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for part in further:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
