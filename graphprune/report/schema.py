"""The shape of ``report.json``: what went in, what came out, and the numbers that prove it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    ValidationError,
    model_validator,
)

from graphprune.errors import RunFolderError
from graphprune.files import write_json

SCHEMA: Final = "graphprune.report/1"

Count = Annotated[int, Field(ge=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Entry(BaseModel):
    """What all parts of the report have in common: no unknown keys, no change, no nan, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Entry):
    """The model that was compressed; `source` is the folder or hub name that it was read from.

    `opened_by` says what opens the pruned float model: stock transformers, graphprune where layers differ in width, or
    onnxruntime where an ONNX file was pruned.
    """

    name: str
    source: str
    architecture: str
    opened_by: Literal["from_pretrained", "graphprune.load", "onnxruntime"]


class Parameters(Entry):
    """Numbers of parameters, and the share of them that was removed, in 0 to 1.

    `asked_share` is of what the budget counts, which need not be parameters.
    """

    before: Count
    after: Count
    asked_share: Share
    removed_share: Share


class Budget(Entry):
    """What was asked for: a share of the `unit` that the budget counts, and the share that pruning came to."""

    unit: str
    asked_share: Share
    removed_share: Share


class Bytes(Entry):
    """Bytes on disk: the source's weights, the pruned model's, and the ONNX model with its data."""

    source: Count
    pruned: Count
    onnx: Count


class Protocol(Entry):
    """How perplexity was measured: on which text, over how many tokens, in windows of how many."""

    text: str
    tokens: Count
    window: Count
    description: str


class Perplexity(Entry):
    """Perplexity after each stage, all by one protocol; an ONNX file has no recovery."""

    dense: Positive
    pruned: Positive
    quantized: Positive
    recovered: Positive | None
    onnx: Positive
    protocol: Protocol


class Distance(Entry):
    """How far the outputs of an ONNX file that is no decoder are from the source's, on `inputs`.

    The largest difference of any output, over the largest number of that.
    """

    pruned: AtLeastZero
    onnx: AtLeastZero
    inputs: str


class TokensPerSecond(Entry):
    """Greedy decoding speed in onnxruntime on this machine, the two models under equal conditions."""

    dense_onnx_fp32: Positive
    compact_onnx: Positive
    threads: Count
    new_tokens: Count


class Certificate(Entry):
    """Whether the output stayed the same when units were permuted, and when zeroed ones were removed."""

    groups: Count
    permuted_max_error: AtLeastZero
    removed_max_error: AtLeastZero
    tolerance: AtLeastZero
    ok: StrictBool


class Verify(Entry):
    """How far the ONNX model is from the model it was exported from.

    `tolerances` maps a measure (``max_abs_error``, ``top1_agreement``, ``kl`` or a name in `checks`) to its
    bound: the least for ``top1_agreement``, the greatest for all others. A measure without one is not judged. The first
    three are of next-token predictions, and None where a file makes none.
    """

    max_abs_error: AtLeastZero | None
    top1_agreement: Share | None
    kl: float | None
    tokens: Count
    checks: dict[str, float]
    tolerances: dict[str, float] = {}

    @model_validator(mode="after")
    def _tolerances_are_of_measures(self) -> Self:
        unknown = sorted(
            self.tolerances.keys() - {"max_abs_error", "top1_agreement", "kl"} - self.checks.keys()
        )
        if unknown:
            raise ValueError(f"tolerances for what was not measured: {', '.join(unknown)}")
        return self


class Stage(Entry):
    """One stage of the run: wall time, and the process's peak of resident memory while it ran."""

    name: str
    seconds: AtLeastZero
    peak_bytes: Count
    state: Literal["done", "reused"]
    note: str


class GroupSummary(Entry):
    """`count` node groups that are alike: `size` units each, coupled over `members` parameter axes."""

    kind: str
    count: Count
    size: Count
    members: Count
    parameters_per_unit: Count
    prunable: StrictBool
    reason: str | None


class Width(Entry):
    """Units of one pruned node group before and after, in the order of the layers."""

    name: str
    kind: str
    before: Count
    after: Count


class Generation(Entry):
    """What both models write after `prompt`, greedily."""

    prompt: str
    dense: str
    compact: str


class QuantizedLayer(Entry):
    """Relative Frobenius error of a layer's weight: plainly quantized, and with LoftQ's adapter."""

    name: str
    format: str
    shape: tuple[Count, ...]
    error_before: AtLeastZero
    error_after: AtLeastZero


class RecoveryRound(Entry):
    """Where recovery stood after a round; number 0 is the model as the phase found it.

    `mix` is the share of each source that the round trained on, `losses` are on held-out windows in nats per token,
    and `degradation` is the same above the dense model's. `kept` says whether these adapters remained.
    """

    phase: str
    number: Count
    step: Count
    mix: dict[str, Share]
    losses: dict[str, float]
    degradation: dict[str, float]
    kept: StrictBool

    @model_validator(mode="after")
    def _sources_are_measured(self) -> Self:
        unmatched = sorted(
            (self.losses.keys() ^ self.degradation.keys()) | (self.mix.keys() - self.losses.keys())
        )
        if unmatched:
            raise ValueError(f"sources without all of their numbers: {', '.join(unmatched)}")
        return self


class Environment(Entry):
    """The machine."""

    python: str
    platform: str
    processor: str
    cores: Count
    memory_bytes: Count


class Report(Entry):
    """All that ``report.json`` holds and ``report.html`` shows.

    `perplexity` and `tokens_per_second` are None of an ONNX file that is no decoder, and `distance` of all others;
    `tokens_per_second` where a recipe asks for no measuring, too.
    `versions` maps a package to its version, `created` is an ISO 8601 time, `recovery` is empty where nothing was held
    out to measure rounds on, and `limits` is what the reader must know before relying on the numbers.
    """

    schema_name: Literal["graphprune.report/1"] = Field(default=SCHEMA, alias="schema")
    model: Model
    parameters: Parameters
    budget: Budget
    bytes: Bytes
    perplexity: Perplexity | None
    tokens_per_second: TokensPerSecond | None
    distance: Distance | None
    certificate: Certificate
    verify: Verify
    stages: tuple[Stage, ...]
    groups: tuple[GroupSummary, ...]
    widths: tuple[Width, ...]
    generations: tuple[Generation, ...]
    layers_quantized: tuple[QuantizedLayer, ...]
    recovery: tuple[RecoveryRound, ...]
    environment: Environment
    versions: dict[str, str]
    seed: int
    recipe: dict[str, JsonValue]
    command: str
    created: str
    limits: tuple[str, ...]


def write_report_json(report: Report, path: Path) -> None:
    """Write `report` to `path`, atomically."""
    write_json(path, report.model_dump(mode="json", by_alias=True))


def read_report(path: Path) -> Report:
    """Return the report that `path` holds.

    Raises:
        RunFolderError: The file cannot be read, is of another schema, or does not hold a whole report.
    """
    again = "run graphprune again to write a new report"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is not a readable report: {error}", again) from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise RunFolderError(
            f"{path} has the schema {schema!r}, and this version reads {SCHEMA!r}",
            "read it with the version of graphprune that wrote it",
        )
    try:
        return Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RunFolderError(f"{path} is not a whole report: '{place}': {first['msg']}", again) from error


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``report.json``."""
    return Report.model_json_schema(by_alias=True)
