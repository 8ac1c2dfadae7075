"""The recipe: everything a run needs to know, read from YAML and checked before anything else happens."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphprune.errors import RecipeError

Steps = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Rate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Bits = Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """What to compress."""

    id: str = Field(default="demo", description="a transformers folder, a hub id, or demo")


class Data(_Section):
    """Text to learn from, and other text to judge by."""

    train: str = Field(description="file (.txt, .jsonl, also .gz) or hub data set")
    evaluate: str = Field(description="likewise, disjoint from train")
    field: str = "text"
    window: Positive = Field(default=256, description="tokens of a training window")
    train_windows: Positive | None = Field(default=None, description="at most; null for all that fit")
    evaluate_window: Positive = 512
    evaluate_windows: Positive = Field(default=16, description="at most")


class Training(_Section):
    """What every training stage shares."""

    learning_rate: Rate = 3e-4
    batch_size: Positive = 4
    distill: Weight = Field(default=1.0, description="weight of the dense model's predictions in the loss")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


class Distribution(_Section):
    """Knowledge distribution: each group pruned alone, and the loss's rise measured, before anything is decided."""

    ratios: tuple[Rate, ...] = Field(default=(), description="shares of a group's units; none: not measured")
    windows: Positive = Field(default=8, description="of the training text, others than units are scored on")
    unprunable: Share = Field(default=0.0, description="share of groups, the most sensitive, that stay whole")


class Prune(_Section):
    """LHSPG: which units go, and how gently."""

    remove: Rate = Field(default=0.2, description="share of what `budget` names")
    budget: str = Field(default="parameters", description="parameters, macs, kv_bytes, bytes or latency")
    layout: Literal["uniform", "per_layer"] = Field(
        default="uniform", description="uniform: one width for all layers; per_layer: each its own"
    )
    normalise: Literal["none", "kind"] = Field(
        default="none",
        description="kind: scores of each kind count as much, for what they cost, as any other's",
    )
    keep_at_least: Share = Field(default=0.1, description="share of its units that each group keeps")
    sequence: Positive = Field(
        default=1024, description="for budgets macs and latency: positions that a token attends to"
    )
    latency_tokens: Positive = Field(
        default=1, description="for budget latency: tokens at once; 1: decoding, more: a prompt"
    )
    weight_bits: Bits = Field(
        default=4.5, description="for budget bytes: of a matrix's weight, scales included"
    )
    embedding_bits: Bits = Field(default=8.5, description="likewise, of tables that are read by index")
    distribution: Distribution = Distribution()
    kinds: tuple[str, ...] = Field(default=("ffn", "attention_heads"), min_length=1)
    width_multiple: dict[str, Positive] = Field(default={"ffn": 64}, description="kept units by kind")
    saliency: str = "fisher"
    calibration_windows: Positive = 32
    rank: Positive = 16
    alpha: Positive = 32
    warmup_steps: Steps = 8
    periods: Positive = 4
    period_steps: Positive = 10
    settle_steps: Steps = Field(default=8, description="steps after the last unit is gone")
    half_space: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="epsilon of the projection test"
    )
    repair: Switch = Field(default=True, description="least-squares repair of what reads the removed units")
    training: Training = Training()


class Quantize(_Section):
    """LoftQ."""

    format: str = "nf4"
    block_size: Positive = 64
    rank: Positive = 16
    iterations: Steps = 5
    calibration_windows: Steps = Field(
        default=0, description="windows of the training text that layers are fitted to; 0: LoftQ as published"
    )
    guided: Switch = Field(
        default=True, description="with calibration windows, let errors count by how much they raise the loss"
    )
    scale_storage: Literal["float32", "float16", "double"] = Field(
        default="float32", description="of the blocks' scales; double quantizes them too"
    )
    embedding: str | None = Field(
        default="int8", description="format of a tied embedding; null keeps it float32"
    )


class Recover(_Section):
    """Training of the adapters on the quantized base."""

    steps: Steps = 60
    training: Training = Training(learning_rate=2e-4)


class Export(_Section):
    """The ONNX file."""

    weights: Literal["fast", "exact"] = Field(
        default="fast", description="fast rounds NF4 levels to 8-bit integers"
    )
    verify_windows: Positive = Field(default=2, description="evaluation windows that are compared with torch")
    verify_tokens: Positive = Field(default=128, description="tokens of each of them")


class Report(_Section):
    """What the report shows beside numbers."""

    prompts: tuple[str, ...] = ("The capital of France is",)
    new_tokens: Positive = 40
    speed_tokens: Positive = 32


class Recipe(_Section):
    """A whole run."""

    graphprune: Literal[1] = Field(description="version of the recipe's schema")
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    model: Model = Model()
    data: Data
    prune: Prune = Prune()
    quantize: Quantize = Quantize()
    recover: Recover = Recover()
    export: Export = Export()
    report: Report = Report()

    @property
    def digest(self) -> str:
        """A hash of every setting: equal recipes may share a run folder."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The YAML file.
        overrides: Values by dotted key that replace the file's, such as ``{"model.id": "./my-model"}``.

    Raises:
        RecipeError: If the file cannot be read, or a key or value is wrong; the message names line and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}", "give a YAML file") from error
    content, lines = _parse(text, path)
    for key, value in (overrides or {}).items():
        _set(content, key, value)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error, path, lines) from error


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
    return message[:1].lower() + message[1:]


def _ancestors(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
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
