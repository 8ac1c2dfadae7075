"""What a run on an ONNX file starts from, opened and checked before its folder is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from graphprune.errors import RecipeError, SourceError
from graphprune.export.runtime import OnnxDecoder
from graphprune.pipeline.inputs import check_names, first_megabyte
from graphprune.pipeline.onnx_arrays import PAST, Arrays, fed, read_arrays, reads_text
from graphprune.pipeline.stamps import LATER, section_digest, start_digest
from graphprune.prune.target import check_windows
from graphprune.recipe import Recipe
from graphprune.saliency.onnx import ONNX_SALIENCIES
from graphprune.source.location import ModelSource, find_file, place_of
from graphprune.source.model import load_tokenizer
from graphprune.source.text import Windows, cut_windows, read_text
from graphprune.trace.onnx_reading import read_onnx

READ: Mapping[str, frozenset[str]] = {
    "prune": frozenset(
        {
            *("method", "saliency", "calibration_windows", "repair"),
            *("remove", "kinds", "layout", "keep_at_least", "width_multiple"),
        }
    ),
    "quantize": frozenset(["format", "block_size", "scale_storage", "embedding", "exclude"]),
    "recover": frozenset(),
    "export": frozenset(["profile", "weights", "verify_windows", "verify_tokens"]),
}
"""The settings that a run on an ONNX file reads, of sections of which it does not read all."""


@dataclass(frozen=True, slots=True)
class OnnxInputs:
    """The file, and what it is run with.

    Attributes:
        recipe: All settings.
        file: The model.
        is_decoder: Whether it predicts each next token from those before.
        tokenizer: None where no text is given.
        train: Text to calibrate on; None where none is given.
        evaluate: Text to judge by; None where none is given.
        arrays: Batches of the user's, the last of them to judge by; none where none are given.
        fingerprint: Of all that every stage reads: a run folder belongs to one of these.
        sections: Hashes of the recipe's sections that only later stages read, by name.
    """

    recipe: Recipe
    file: Path
    is_decoder: bool
    tokenizer: Any
    train: Windows | None
    evaluate: Windows | None
    arrays: tuple[Arrays, ...]
    fingerprint: str
    sections: Mapping[str, str]


def open_onnx_inputs(recipe: Recipe, base: Path) -> OnnxInputs:
    """Open everything that a recipe for an ONNX file names.

    Args:
        recipe: The recipe.
        base: The folder of its file; relative paths may start there.

    Raises:
        RecipeError: If a setting is none for an ONNX file, a format does not exist, or texts are missing or overlap.
        SourceError: If the file, a text or the tokenizer cannot be opened.
        TraceError: If the file is no sound ONNX model.
    """
    check_settings(recipe)
    file = find_file(recipe.model.id, base, "model")
    model = read_onnx(file)
    stamp = _stamp(file, model)
    is_decoder, data = _is_decoder(file, model), recipe.data
    texts = _texts(recipe, base, model, is_decoder)
    tokenizer = _tokenizer(recipe, file, base) if texts else None
    train = evaluate = None
    if texts:
        train = cut_windows(
            texts[0], tokenizer, window=data.window, limit=data.train_windows, name=data.train
        )
        evaluate = cut_windows(
            texts[1],
            tokenizer,
            window=data.evaluate_window,
            limit=data.evaluate_windows,
            name=data.evaluate,
        )
        check_windows(recipe.prune, train)
    arrays: tuple[Arrays, ...] = ()
    if data.inputs is not None:
        path = find_file(data.inputs, base, "file of arrays")
        arrays = tuple(read_arrays(path, model))
        stamp += _digest(path)
    ids = (windows.ids.numpy().tobytes() for windows in (train, evaluate) if windows is not None)
    start = start_digest(recipe, stamp, *(document for text in texts for document in text), *ids)
    sections = {name: section_digest(recipe, name) for name in LATER}
    return OnnxInputs(recipe, file, is_decoder, tokenizer, train, evaluate, arrays, start, sections)


def check_settings(recipe: Recipe) -> None:
    """Refuse what needs a model that can be trained, by name, and what does not exist.

    Raises:
        RecipeError: With all settings that an ONNX file cannot have.
    """
    prune = recipe.prune
    if prune.method != "one_shot":
        raise RecipeError(
            f"prune.method is {prune.method}, and an ONNX file is pruned in one shot, without training",
            "write method: one_shot, or leave it out; with the transformers folder as the model there are the others",
        )
    idle = [f"{section}.{key}" for section, keys in READ.items() for key in _idle(recipe, section, keys)]
    if idle:
        raise RecipeError(
            f"an ONNX file is neither trained nor given adapters: nothing reads {', '.join(idle)}",
            "leave them out: it is pruned in one shot, repaired by least squares and quantized plainly; or give the "
            "transformers folder as the model",
        )
    if prune.saliency not in ONNX_SALIENCIES:
        raise RecipeError.unknown("saliency of ONNX files", prune.saliency, ONNX_SALIENCIES, "prune.saliency")
    if prune.repair == "bias":
        raise RecipeError(
            "prune.repair is bias, and an ONNX file gets no new operators", "write least_squares or none"
        )
    check_names(recipe)


def _idle(recipe: Recipe, section: str, read: frozenset[str]) -> list[str]:
    settings: BaseModel = getattr(recipe, section)
    given = {
        name
        for name, field in type(settings).model_fields.items()
        if getattr(settings, name) != field.get_default(call_default_factory=True)
    }
    if section == "recover" and getattr(settings, "steps", None) == 0:
        given -= {"steps"}
    return sorted(given - read)


def _texts(recipe: Recipe, base: Path, model: ir.Model, is_decoder: bool) -> tuple[list[str], ...]:
    """Return the documents to calibrate on and those to judge by; none where none are given."""
    data = recipe.data
    if not data.train and not data.evaluate and not is_decoder:
        return ()
    if not data.train or not data.evaluate:
        raise RecipeError(
            f"{recipe.model.id} {'predicts text' if is_decoder else 'is given one text'}, and it takes two, one to "
            "calibrate on and another to judge by",
            "give --train FILE and --evaluate FILE, or data.train and data.evaluate in the recipe",
        )
    if not reads_text(model) or data.inputs is not None:
        raise RecipeError(
            f"{recipe.model.id} is given text, and reads "
            + ("data.inputs" if reads_text(model) else ", ".join(str(value.name) for value in fed(model))),
            "leave data.train and data.evaluate out, and give arrays by data.inputs, or nothing",
        )
    texts = tuple(read_text(name, data.field, base) for name in (data.train, data.evaluate))
    if set(texts[0]) & set(texts[1]):
        raise RecipeError(
            f"'{data.train}' and '{data.evaluate}' share documents", "judge by text that was not learned from"
        )
    return texts


def _is_decoder(file: Path, model: ir.Model) -> bool:
    """Whether a file gives logits of each next token: it has a cache, or no token moves what comes before it."""
    names = [str(value.name) for value in fed(model)]
    outputs = {value.name: value for value in model.graph.outputs}
    if not reads_text(model) or "token_type_ids" in names or "logits" not in outputs:
        return False
    if any(name.startswith(PAST) for name in names):
        return True
    if len(outputs["logits"].shape or ()) != 3:
        return False
    decoder = OnnxDecoder(file)
    ids = np.zeros((2, 5), np.int64)
    ids[1, -1] = 1
    first, second = decoder.logits(ids)
    return bool(np.array_equal(first[:-1], second[:-1]) and not np.array_equal(first[-1], second[-1]))


def _tokenizer(recipe: Recipe, file: Path, base: Path) -> Any:
    place = file.parent if recipe.model.tokenizer is None else place_of(recipe.model.tokenizer, base)
    alone = place / "tokenizer.json" if place.is_dir() else place
    if place.is_dir() and any((place / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        return load_tokenizer(ModelSource(place.name, str(place), True))
    if not alone.is_file():
        raise SourceError(
            f"{file.name} has no tokenizer: there is no {alone}",
            "put tokenizer.json beside it, or name its folder (recipe: model.tokenizer)",
        )
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(alone))
    except Exception as error:  # the library raises no narrower one for a file that is no tokenizer
        raise SourceError(f"{alone} is not a tokenizer: {error}", "give a tokenizer.json") from error


def _stamp(file: Path, model: ir.Model) -> str:
    """Return what tells one model from another without reading all of its weights."""
    held = {
        Path(tensor.path)
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    for path in held:
        if not path.is_file():
            raise SourceError(
                f"the weights of {file} lie in {path}, which is not there", "copy both together"
            )
    return _digest(file) + " ".join(f"{path.stat().st_size}:{first_megabyte(path)}" for path in sorted(held))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
