"""What a run starts from, opened and checked before its folder is touched."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from graphprune.coupling.kinds import Kind
from graphprune.errors import RecipeError
from graphprune.pipeline.stacks import stack_storage
from graphprune.pipeline.stamps import LATER, section_digest, start_digest
from graphprune.prune.costs import check_cost
from graphprune.prune.methods.registry import method_named
from graphprune.prune.target import check_windows
from graphprune.recipe import Quantize, Recipe, RecoverySource
from graphprune.recover.course import check_course
from graphprune.recover.sources import Source, open_text, split_sources, without
from graphprune.saliency.registry import saliency_named
from graphprune.source.location import ModelSource, find_model
from graphprune.source.model import load_config, load_tokenizer
from graphprune.source.text import Windows, cut_windows, read_text
from quant.codebooks import get_format
from quant.errors import QuantError
from quant.quantized import check_block_size

_SCALE_BITS = {"float32": 32, "float16": 16, "double": 8.125}


@dataclass(frozen=True, slots=True)
class Inputs:
    """The model's place, its tokenizer, and all texts as windows.

    Attributes:
        recipe: All settings.
        source: Where the model is.
        config: The model's configuration.
        tokenizer: Its tokenizer.
        train: Text to learn from, but for what recovery's sources hold out.
        evaluate: Text to judge by.
        sources: What recovery learns from.
        fingerprint: Of all that every stage reads: a run folder belongs to one of these.
        sections: Hashes of the recipe's sections that only later stages read, by name.
    """

    recipe: Recipe
    source: ModelSource
    config: Any
    tokenizer: Any
    train: Windows
    evaluate: Windows
    sources: tuple[Source, ...]
    fingerprint: str
    sections: Mapping[str, str]


def open_inputs(recipe: Recipe, base: Path) -> Inputs:
    """Open everything that a recipe names.

    Args:
        recipe: The recipe.
        base: The folder of its file; relative paths may start there.

    Raises:
        SourceError: If the model or a text cannot be opened, or a text is too short for one window.
        RecipeError: If a saliency or a format does not exist, texts overlap or have too few windows, or recovery has
            too few steps.
    """
    check_names(recipe)
    data = recipe.data
    train_text = read_text(data.train, data.field, base)
    evaluate_text = read_text(data.evaluate, data.field, base)
    if set(train_text) & set(evaluate_text):
        raise RecipeError(
            f"'{data.train}' and '{data.evaluate}' share documents", "judge by text that was not learned from"
        )
    source = find_model(recipe.model.id, base)
    tokenizer = load_tokenizer(source)
    train = cut_windows(train_text, tokenizer, window=data.window, limit=data.train_windows, name=data.train)
    evaluate = cut_windows(
        evaluate_text, tokenizer, window=data.evaluate_window, limit=data.evaluate_windows, name=data.evaluate
    )
    sources, more_text = _open_sources(recipe, tokenizer, base, train, set(evaluate_text))
    train = without(train, [source.held_out for source in sources if source.held_out is not None])
    check_windows(recipe.prune, train)
    ids = (windows.ids.numpy().tobytes() for windows in (train, evaluate))
    start = start_digest(recipe, _model_stamp(source), *train_text, *evaluate_text, *ids)
    sections = {
        name: section_digest(recipe, name, *(more_text if name == "recover" else ())) for name in LATER
    }
    return Inputs(recipe, source, load_config(source), tokenizer, train, evaluate, sources, start, sections)


def _open_sources(
    recipe: Recipe, tokenizer: Any, base: Path, train: Windows, judged: set[str]
) -> tuple[tuple[Source, ...], list[str]]:
    """Open what recovery learns from; also return the documents that are not those of the training text."""
    settings = recipe.recover
    if settings.sources:
        texts = [
            open_text(entry, tokenizer, window=recipe.data.window, base=base) for entry in settings.sources
        ]
        for entry, text in zip(settings.sources, texts, strict=True):
            if judged.intersection(text.documents):
                raise RecipeError(
                    f"source '{entry.name}' and '{recipe.data.evaluate}' share documents",
                    "judge by text that was not learned from",
                )
        documents = [document for text in texts for document in text.documents]
        sources = split_sources(settings.sources, [text.windows for text in texts], recipe.seed)
    elif settings.rounds > 1:
        entry = RecoverySource(name="train", path=recipe.data.train)
        documents, sources = [], split_sources((entry,), (train,), recipe.seed)
    else:
        documents, sources = [], (Source("train", "text", train, None),)
    check_course(settings, sources)
    return sources, documents


def check_names(recipe: Recipe) -> None:
    """Raise a RecipeError for the first name in a recipe that nothing has."""
    method_named(recipe.prune.method)
    saliency_named(recipe.prune.saliency)
    check_cost(recipe.prune.budget, "prune.budget")
    for key, kinds in (("kinds", recipe.prune.kinds), ("width_multiple", tuple(recipe.prune.width_multiple))):
        for kind in kinds:
            if kind not in get_args(Kind):
                close = difflib.get_close_matches(kind, get_args(Kind), n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(get_args(Kind))}"
                raise RecipeError(f"prune.{key}: there is no kind '{kind}' of node groups", hint)
    for key, name in (
        ("quantize.format", recipe.quantize.format),
        ("quantize.embedding", recipe.quantize.embedding),
        *(("quantize.mix_formats", name) for name in recipe.quantize.mix_formats),
    ):
        if name is not None:
            with _of_the_recipe(key):
                get_format(name)
    with _of_the_recipe("quantize.block_size"):
        check_block_size(recipe.quantize.block_size)
    _check_bits(recipe.quantize)


@contextmanager
def _of_the_recipe(key: str) -> Iterator[None]:
    """Turn the quantizer's error into one of the recipe's key."""
    try:
        yield
    except QuantError as error:
        raise RecipeError(f"{key}: {error.problem}", error.remedy) from error


def _check_bits(settings: Quantize) -> None:
    """Raise a RecipeError if the narrowest format of a mix takes more bits than there are."""
    if settings.bits is None:
        return
    least, narrowest = min((_bits(settings, name), name) for name in settings.mix_formats)
    if settings.bits < least:
        raise RecipeError(
            f"quantize.bits: {settings.bits} bits a weight, and {narrowest} takes {least:.4g} with its scales",
            "raise it, set quantize.scale_storage to double, or raise quantize.block_size",
        )


def stack_format(settings: Quantize) -> str:
    """Return the format of stacks: the recipe's, or of a mix the widest within the budget, else the narrowest."""
    if settings.bits is None:
        return settings.format
    single = settings.model_copy(update={"scale_storage": stack_storage(settings.scale_storage)})
    by_size = sorted((_bits(single, name), name) for name in settings.mix_formats)
    return max([pair for pair in by_size if pair[0] <= settings.bits] or by_size[:1])[1]


def _bits(settings: Quantize, name: str) -> float:
    format = get_format(name)
    return format.bits + (1 + format.affine) * _SCALE_BITS[settings.scale_storage] / settings.block_size


def _model_stamp(source: ModelSource) -> str:
    """Return what tells one model from another without reading all of its weights."""
    if not source.is_local:
        return source.location
    folder = Path(source.location)
    files = sorted(folder.glob("*.safetensors"))
    sizes = " ".join(f"{file.name}:{file.stat().st_size}:{first_megabyte(file)}" for file in files)
    return (folder / "config.json").read_text(encoding="utf-8") + sizes


def first_megabyte(file: Path) -> str:
    """Return a hash of a file's beginning."""
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read(1 << 20)).hexdigest()
