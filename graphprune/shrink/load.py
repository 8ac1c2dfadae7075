"""Models whose layers differ in width, opened again: the stock class, its modules fitted to the saved weights.

A transformers configuration has one number for all layers, so the class builds every layer at the original's widths.
What the smaller model has otherwise (shapes of weights, numbers that modules keep in attributes) is recorded beside
the weights, by name, and set between building and loading. The loading itself is stock transformers'.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphprune.errors import ShrinkError, SourceError
from graphprune.source.location import ModelSource, find_model
from graphprune.source.model import load_config, load_model, model_class

RECORD = "graphprune.json"
KEY = "layers"
"""Under which a `Difference` stands in the record."""

_GIVE = "give a folder that graphprune wrote, with all of its files"


class Difference(BaseModel):
    """What a model has otherwise than its class builds it from its configuration.

    Attributes:
        shapes: Of weights, by qualified name.
        attributes: Numbers, by qualified name of the module and of the attribute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shapes: dict[str, list[int]] = {}
    attributes: dict[str, dict[str, int | float]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return how a transformers model differs from what its class builds.

        Raises:
            ShrinkError: If it has other modules or weights, or what differs is not saved with a model.
        """
        stock = _stock(model)
        built, own = _named(stock), _named(model)
        strange = sorted(built.keys() ^ own.keys())
        if strange:
            raise ShrinkError(
                f"a stock {type(model).__name__} has other weights: '{strange[0]}'",
                "merge adapters first, and leave modules as the class builds them",
            )
        shapes = {name: list(own[name].shape) for name in own if own[name].shape != built[name].shape}
        unsaved = sorted(shapes.keys() - model.state_dict().keys())
        if unsaved:
            raise ShrinkError(
                f"'{unsaved[0]}' is computed from the configuration, and is otherwise in this model",
                "prune kinds of groups that do not reach it: leave this one out of kinds (recipe: prune.kinds)",
            )
        modules = dict(stock.named_modules())
        attributes = {
            path: changed
            for path, module in model.named_modules()
            if (changed := dict(_changed(module, modules[path])))
        }
        return cls(shapes=shapes, attributes=attributes)

    def apply(self, model: nn.Module) -> None:
        """Fit a model, as its class builds it, in place; weights that change shape hold nothing yet.

        Raises:
            SourceError: If it has no such weight or attribute.
        """
        for name, shape in self.shapes.items():
            path, _, leaf = name.rpartition(".")
            module = _submodule(model, path)
            weight = getattr(module, leaf, None)
            if not isinstance(weight, Tensor):
                raise _unfit(model, name)
            empty = weight.new_empty(shape)
            kept = nn.Parameter(empty, weight.requires_grad) if isinstance(weight, nn.Parameter) else empty
            setattr(module, leaf, kept)
        for path, values in self.attributes.items():
            module = _submodule(model, path)
            for name, value in values.items():
                if type(vars(module).get(name)) is not type(value):
                    raise _unfit(model, f"{path}.{name}")
                setattr(module, name, value)


def load(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Open a model that graphprune wrote, whatever the widths of its layers.

    Args:
        folder: A transformers folder. If no `graphprune.json` in it says that layers differ, it is opened as any other.
        dtype: Of the weights; by default the one that they were saved in.

    Returns:
        An instance of the stock class, in evaluation mode.

    Raises:
        SourceError: If it is no such folder, or its files do not fit together.
    """
    source = find_model(str(folder))
    if not source.is_local:
        raise SourceError(f"there is no folder '{folder}'", _GIVE)
    model: Any = _open(source, dtype or "auto")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def is_uneven(folder: Path) -> bool:
    """Whether `load` alone opens a model's folder, for its configuration does not describe it.

    Raises:
        SourceError: If its record is broken.
    """
    return _recorded(folder / RECORD) is not None


def _open(source: ModelSource, dtype: Any) -> nn.Module:
    kind = model_class(load_config(source))
    difference = _recorded(Path(source.location) / RECORD)
    if difference is None:
        return load_model(source, dtype, kind)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise SourceError(f"{source.location}/config.json names no architecture", _GIVE)
    return load_model(source, dtype, _fitted(kind, difference))


def _fitted(kind: type[PreTrainedModel], difference: Difference) -> type[PreTrainedModel]:
    """Return a class whose instances are of `kind`, built with a difference.

    The constructor is the one place between building and loading that from_pretrained leaves to a class.
    """

    def build(model: Any, config: Any, *arguments: Any, **keywords: Any) -> None:
        model.__class__ = kind  # from the start, so that nothing ever sees another class
        model.__init__(config, *arguments, **keywords)
        difference.apply(model)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _recorded(path: Path) -> Difference | None:
    """Return what a folder's record says of its layers, or None if it says nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return Difference.model_validate(content[KEY]) if KEY in content else None
    except (OSError, ValueError, TypeError, ValidationError) as error:
        first = str(error).strip().splitlines()[0]
        raise SourceError(f"{path} does not say what the layers are: {first}", _GIVE) from error


def _stock(model: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    except Exception as error:  # a class says in its own way that a configuration is none
        raise ShrinkError(
            f"{type(model).__name__} cannot be built from its configuration: {error}",
            "give a transformers model",
        ) from error


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _changed(module: nn.Module, stock: nn.Module) -> Iterator[tuple[str, int | float]]:
    """Yield the numbers that a module keeps in attributes and that its stock twin has otherwise."""
    for name, value in vars(module).items():
        twin = vars(stock).get(name)
        if isinstance(value, (int, float)) and type(twin) is type(value) is not bool and twin != value:
            yield name, value


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise _unfit(model, path) from None


def _unfit(model: nn.Module, name: str) -> SourceError:
    return SourceError(f"{RECORD} speaks of '{name}', which a {type(model).__name__} does not have", _GIVE)
