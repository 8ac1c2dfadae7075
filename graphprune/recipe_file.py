"""Reading a recipe from YAML, with errors that name the line and the key, and writing it with every setting."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from graphprune.errors import RecipeError
from graphprune.recipe import Recipe


def load_recipe(path: Path | None, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The YAML file; None for an ONNX file of which all settings are left at their defaults.
        overrides: Values by dotted key that replace the file's, such as ``{"model.id": "./my-model"}``.

    Raises:
        RecipeError: If the file cannot be read, or a key or value is wrong; the message names line and key.
    """
    overrides = overrides or {}
    content, lines = _read(path) if path is not None else (_of_defaults(overrides.get("model.id")), {})
    path = path or Path("command line")
    for key, value in overrides.items():
        _set(content, key, value)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error, path, lines) from error


def _of_defaults(model: object) -> dict[str, Any]:
    if not str(model).endswith(".onnx"):
        raise RecipeError(
            f"without a recipe only a .onnx file can be run, and the model is {model}",
            "give a recipe, such as examples/recipes/demo.yaml",
        )
    return {"graphprune": 1}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}", "give a YAML file") from error
    return _parse(text, path)


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML with every setting resolved."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(error: ValidationError, path: Path, lines: dict[str, int]) -> RecipeError:
    # A misspelt key is also a missing one: say the former.
    first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    line = next((lines[name] for name in _ancestors(key) if name in lines), 1)
    place = f"{path}:{line}"
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"did you mean '{close[0]}'?" if close else f"known keys here: {', '.join(known)}"
        return RecipeError(f"{place}: unknown key '{key}'", remedy)
    if first["type"] == "missing":
        return RecipeError(f"{place}: key '{key}' is missing", "add it to the recipe")
    given = json.dumps(first["input"], default=str)
    return RecipeError(f"{place}: {key} is {given}: {_sentence(first['msg'])}", f"change {key} in the recipe")


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ").replace("a valid tuple", "a list")
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping of keys", message)
    return message[:1].lower() + message[1:]


def _ancestors(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int):  # an entry of a list, whose section it is already
            continue
        annotation = section.model_fields[part].annotation
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = content.get(section)
        content[section] = inner if isinstance(inner, dict) else {}
        content = content[section]
    content[last] = value


def _parse(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{path} is not YAML: {' '.join(str(error).split())}", "mend the line it names"
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys", "start from examples/recipes/demo.yaml")
    content: dict[str, Any] = _construct(root, "", path, lines)
    return content, lines


def _construct(node: yaml.Node, key: str, path: Path, lines: dict[str, int]) -> Any:
    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            place = f"{key}.{name}".strip(".")
            if name in result:
                raise RecipeError(
                    f"{path}:{name_node.start_mark.line + 1}: key '{place}' stands twice", "keep one of them"
                )
            lines[place] = name_node.start_mark.line + 1
            result[name] = _construct(value_node, place, path, lines)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, f"{key}.{i}", path, lines) for i, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    """Read a scalar by YAML 1.2: `3e-4` is a number, `on` a word, and `012` twelve."""
    text: str = node.value
    if getattr(node, "style", None) in ("'", '"', "|", ">"):
        return text
    if text in ("", "null", "~"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return text
