"""A smaller model written as a transformers folder, whatever the widths of its layers."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graphprune.errors import ShrinkError
from graphprune.files import write_json
from graphprune.shrink.gated import is_gated
from graphprune.shrink.load import KEY, RECORD, Difference, load

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def save(model: Any, folder: str | Path) -> None:
    """Write a transformers model so that it can be opened again, whatever the widths of its layers.

    Where its configuration describes it, stock `from_pretrained` opens the folder, else `graphprune.load` alone does,
    by the record beside the weights. The files are read back before they get their names. What else is in the folder,
    such as a tokenizer, stays, but for the weights of another model.

    Args:
        model: What `graphprune.shrink` returned, or any other; adapters merged.
        folder: Where to; created if it is not there.

    Raises:
        ShrinkError: If it is no transformers model, has an optimizer's gates on it or modules that its class does not
            build, or would not be read back bit for bit. The folder is as it was.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ShrinkError(f"{place} is a file", "give a folder")
    record = record_of(_checked(model))
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=place) as name:
        temporary = Path(name)
        model.save_pretrained(temporary)
        write_json(temporary / RECORD, record)
        _check_state(model.state_dict(), load(temporary).state_dict())
        for pattern in _WEIGHTS:
            for old in place.glob(pattern):
                old.unlink()
        for file in temporary.iterdir():
            os.replace(file, place / file.name)


def _checked(model: Any) -> PreTrainedModel:
    kind = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        raise ShrinkError(f"a {kind} has adapters beside its weights", "save model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise ShrinkError(
            f"a {kind} is no transformers model, and has no folder that says how to build it",
            "save its state_dict, or write it by graphprune.export_onnx",
        )
    if is_gated(model):
        raise ShrinkError(
            "the model still has the gates of its pruning on it, which no file would hold",
            "call close() on the optimizer first (its plan stays), then shrink, and save what that returns",
        )
    return model


def record_of(model: Any) -> dict[str, Any]:
    """Return what is written beside the weights: where the layers differ from what the class builds, what they are.

    Raises:
        ShrinkError: As `Difference.of`.
    """
    difference = Difference.of(model)
    layers = {KEY: difference.model_dump()} if difference.shapes else {}
    return {"schema": "graphprune.model/1", "graphprune_version": version("graphprune"), **layers}


def _check_state(saved: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    for name in sorted(saved.keys() | read.keys()):
        before, after = saved.get(name), read.get(name)
        if (
            before is None
            or after is None
            or before.dtype != after.dtype
            or not torch.equal(before.cpu(), after)
        ):
            raise ShrinkError(
                f"'{name}' is another one when the folder is opened again",
                "cast all weights to one dtype, that of the configuration, and leave modules as the class builds them",
            )
