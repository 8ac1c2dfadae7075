"""The recipe: everything a run needs to know, and what is wrong with it before anything else happens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

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
    """What to compress; a word or path in the section's place is its `id`."""

    id: str = Field(default="demo", description="a transformers folder, a hub id, demo, or a .onnx file")
    tokenizer: str | None = Field(
        default=None, description="folder or tokenizer.json of a .onnx file that has none beside it"
    )

    @model_validator(mode="before")
    @classmethod
    def _is_its_id(cls, given: Any) -> Any:
        return {"id": given} if isinstance(given, str) else given

    @property
    def is_onnx(self) -> bool:
        """Whether it is an ONNX file, of which no torch module is built."""
        return _names_onnx_file(self.id)

    @field_validator("tokenizer")
    @classmethod
    def _others_bring_theirs(cls, tokenizer: str | None, info: ValidationInfo) -> str | None:
        if tokenizer is not None and not _names_onnx_file(info.data.get("id")):
            raise ValueError("only a .onnx file is told its tokenizer; others bring theirs")
        return tokenizer


class Data(_Section):
    """Text to learn from, and other text to judge by; an ONNX file that reads none goes without."""

    train: str = Field(description="file (.txt, .jsonl, also .gz) or hub data set")
    evaluate: str = Field(description="likewise, disjoint from train")
    field: str = "text"
    window: Positive = Field(default=256, description="tokens of a training window")
    train_windows: Positive | None = Field(default=None, description="at most; null for all that fit")
    evaluate_window: Positive = 512
    evaluate_windows: Positive = Field(default=16, description="at most")
    inputs: str | None = Field(
        default=None, description="for an ONNX file that reads no text: .npz of rows by input; the last judge"
    )


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

    @field_validator("unprunable")
    @classmethod
    def _sensitivity_is_measured(cls, unprunable: float, info: ValidationInfo) -> float:
        if unprunable > 0 and info.data.get("ratios") == ():
            raise ValueError("without ratios nothing is measured; give ratios too")
        return unprunable


class Paper(_Section):
    """What LoRAShear's paper leaves open of LHSPG as published."""

    saliency: Literal["taylor", "magnitude", "cosine"] = Field(
        default="taylor", description="by which units are chosen, from weights and LoRA's factors"
    )
    gamma: Weight = Field(default=1.0, description="share of BA that moves into fading weights in a step")
    forget: Switch = Field(default=True, description="B's moments start afresh after a merge")


class LoRAPrune(_Section):
    """LoRAPrune's schedule and importance; defaults are the paper's."""

    steps: Positive = 300
    warmup: Share = Field(default=0.1, description="share of the steps before the first unit goes")
    cooldown: Share = Field(default=0.1, description="share of the steps after the last unit is gone")
    every: Positive = Field(default=10, description="steps from one removal to the next")
    memory: Share = Field(default=0.9, description="share of the old importance that a step keeps")
    importance: Literal["published", "released"] = Field(
        default="published", description="(Ĝ w)², or the released program's normalised |Ĝ w|"
    )

    @field_validator("cooldown")
    @classmethod
    def _something_lies_between(cls, cooldown: float, info: ValidationInfo) -> float:
        if cooldown + info.data.get("warmup", 0.0) >= 1:
            raise ValueError("with the warm-up it leaves no step in which units go")
        return cooldown


class Prune(_Section):
    """Which units go, how many, and how gently.

    In paper mode the base changes from the first period on: nothing is left to distil from or to repair by. `repair`
    and `training.distill` are then off unless they are given, and may not be given otherwise.
    """

    method: str = Field(default="lhspg", description="lhspg, loraprune, one_shot or blocks")
    remove: Rate = Field(default=0.2, description="share of what `budget` names")
    budget: str = Field(default="parameters", description="parameters, macs, kv_bytes, bytes or latency")
    layout: Literal["uniform", "per_layer"] = Field(
        default="uniform", description="uniform: one width for all layers; per_layer: each its own"
    )
    normalise: Literal["auto", "none", "kind"] = Field(
        default="auto",
        description="kind: scores of each kind count as much, for what they cost, as any other's; auto: where the "
        "saliency is not one of the loss, whose scores are on one scale",
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
    mode: Literal["gated", "paper"] = Field(default="gated", description="of lhspg; paper: as published")
    paper: Paper = Paper()
    warmup_steps: Steps = 8
    periods: Positive = 4
    period_steps: Positive = 10
    settle_steps: Steps = Field(default=8, description="steps after the last unit is gone")
    half_space: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="epsilon of the projection test"
    )
    loraprune: LoRAPrune = LoRAPrune()
    repair: Literal["none", "bias", "least_squares"] = Field(
        default="least_squares", description="how what reads the removed units makes up for them"
    )
    training: Training = Training()

    @model_validator(mode="before")
    @classmethod
    def _off_in_paper_mode(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("mode") != "paper":
            return given
        training = given.get("training", {})
        training = {"distill": 0.0, **training} if isinstance(training, dict) else training
        return {"repair": "none", **given, "training": training}

    @field_validator("budget")
    @classmethod
    def _blocks_are_counted_in_parameters(cls, budget: str, info: ValidationInfo) -> str:
        if budget != "parameters" and info.data.get("method") == "blocks":
            raise ValueError("with prune.method blocks there is only parameters")
        return budget

    @field_validator("mode")
    @classmethod
    def _mode_is_of_lhspg(cls, mode: str, info: ValidationInfo) -> str:
        if mode == "paper" and info.data.get("method") != "lhspg":
            raise ValueError("only prune.method lhspg has a paper mode")
        return mode

    @field_validator("repair")
    @classmethod
    def _repair_wants_gates(cls, repair: str, info: ValidationInfo) -> str:
        if repair != "none" and info.data.get("mode") == "paper":
            raise ValueError("in paper mode the base changes from the first period on; there is only none")
        return repair

    @field_validator("training")
    @classmethod
    def _teacher_wants_gates(cls, training: Training, info: ValidationInfo) -> Training:
        if training.distill > 0 and info.data.get("mode") == "paper":
            raise ValueError("in paper mode no un-pruned model is left to learn from; distill must be 0")
        return training

    @model_validator(mode="after")
    def _nothing_is_set_in_vain(self) -> Self:
        idle = {f"method {self.method}": _IDLE.get(self.method, ())}
        if self.method != "loraprune":
            idle[f"method {self.method}"] += ("loraprune",)
        if self.mode != "paper":
            idle[f"mode {self.mode}"] = ("paper",)
        fields = type(self).model_fields
        for how, names in idle.items():
            vain = [f"prune.{name}" for name in names if getattr(self, name) != fields[name].default]
            if vain:
                raise ValueError(f"with {how} nothing reads {', '.join(vain)}")
        if self.layout == "uniform" and self.distribution.unprunable:
            raise ValueError(
                "distribution.unprunable keeps single layers whole, and layout uniform gives all layers one width; "
                "set prune.layout to per_layer"
            )
        return self


_SCHEDULE = "warmup_steps", "periods", "period_steps", "settle_steps", "half_space"
_IDLE: dict[str, tuple[str, ...]] = {
    "blocks": ("layout", "normalise", "saliency", "kinds", "repair", "distribution", *_SCHEDULE),
    "loraprune": _SCHEDULE,
    "one_shot": _SCHEDULE,
}
"""What built-in methods do not read; one from outside may read anything."""


class Quantize(_Section):
    """LoftQ."""

    format: str = "nf4"
    block_size: Positive = 64
    rank: Positive = 16
    iterations: Steps = 5
    bits: float | None = Field(
        default=None,
        gt=0,
        le=16,
        description="bits a weight with scales, without adapters: each layer takes one of mix_formats, not format",
    )
    mix_formats: tuple[str, ...] = Field(default=("uint2", "uint3", "uint4"), min_length=1)
    propagation: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="with calibration windows, share of earlier layers' errors that a layer takes back",
    )
    calibration_windows: Steps = Field(
        default=0, description="windows of the training text that layers are fitted to; 0: LoftQ as published"
    )
    guided: Switch = Field(
        default=True, description="with calibration windows, let errors count by how much they raise the loss"
    )
    reconstruction_epochs: Steps = Field(
        default=0,
        description="with calibration windows, passes over them in which codes, scales and adapters of each block are "
        "trained together for what the dense block puts out",
    )
    scale_storage: Literal["float32", "float16", "double"] = Field(
        default="float32", description="of the blocks' scales; double quantizes them too"
    )
    embedding: str | None = Field(
        default="int8", description="format of a tied embedding; null keeps it float32"
    )

    exclude: tuple[str, ...] = Field(
        default=(), description="regular expressions; weights in whose names one is found stay float"
    )

    @model_validator(mode="after")
    def _nothing_is_set_in_vain(self) -> Self:
        idle = [("bits", "mix_formats")] if self.bits is None else []
        if not self.calibration_windows:
            idle += [
                ("calibration_windows", name) for name in ("propagation", "guided", "reconstruction_epochs")
            ]
        for missing, name in idle:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"without {missing} nothing reads quantize.{name}")
        if self.bits is not None and self.format != type(self).model_fields["format"].default:
            raise ValueError(
                "with bits each layer takes one of mix_formats, and nothing reads quantize.format"
            )
        return self


class RecoverySource(_Section):
    """One of the texts that recovery mixes."""

    name: str = Field(min_length=1)
    path: str = Field(description="file (.txt, .jsonl, also .gz) or hub data set")
    field: str = "text"
    kind: Literal["text", "instruct"] = Field(
        default="text",
        description="instruct: after all text; of rows with prompt and response, responses count",
    )
    hold_out: Positive = Field(default=16, description="windows that are measured and never trained on")


class Recover(_Section):
    """Training of adapters after pruning, on a mix of texts that follows what the model has forgotten."""

    base: Literal["quantized", "pruned"] = Field(
        default="quantized",
        description="pruned: before quantization, adapters are merged into the float model",
    )
    rank: Positive = Field(
        default=16, description="of the adapters on a pruned base; on a quantized one: quantize's"
    )
    alpha: Positive = Field(default=32, description="likewise, numerator of their scale")
    sources: tuple[RecoverySource, ...] = Field(default=(), description="none: data.train alone")
    steps: Steps = Field(
        default=60, description="at most, shared equally by phases (text, instruct) and rounds"
    )
    rounds: Positive = Field(
        default=1, description="of each phase, at most; the mix is decided anew before each"
    )
    floor: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5,
        description="share of every batch that all sources share equally, whatever their degradation",
    )
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=0.25,
        description="nats per token by which a source is worse that gets e times as much of the rest",
    )
    least_improvement: Weight = Field(default=0.005, description="nats per token that count as one")
    patience: Positive = Field(default=2, description="rounds without one after which a phase ends")
    accumulate: Positive = Field(default=1, description="batches of a step")
    training: Training = Training(learning_rate=2e-4)


class Export(_Section):
    """The ONNX file."""

    profile: Literal["cpu", "cuda", "portable"] = Field(
        default="cpu", description="what it is to run on; portable has operators of the ONNX standard alone"
    )
    adapters: Literal["overridable", "constant", "merged"] = Field(
        default="overridable",
        description="constant takes no others; merged is dense float32, adapters added",
    )
    weights: Literal["fast", "exact"] = Field(
        default="fast", description="fast rounds NF4 levels to 8-bit integers"
    )
    cache: Literal["growing", "shared"] = Field(
        default="growing",
        description="shared: written where it lies, as onnxruntime-genai has it; then several new tokens of several "
        "texts behind earlier ones are not computed at once",
    )
    verify_windows: Positive = Field(default=2, description="evaluation windows that are compared with torch")
    verify_tokens: Positive = Field(default=128, description="tokens of each of them")

    @field_validator("cache")
    @classmethod
    def _shared_cache_is_of_onnxruntime(cls, cache: str, info: ValidationInfo) -> str:
        if cache == "shared" and info.data.get("profile") == "portable":
            raise ValueError("with export.profile portable there is only growing")
        return cache


class Report(_Section):
    """What the report shows beside numbers."""

    prompts: tuple[str, ...] = ("The capital of France is",)
    new_tokens: Positive = 40
    speed_tokens: Steps = Field(
        default=32,
        description="tokens that are decoded to measure speed; 0 measures none, and writes no dense ONNX file for it",
    )


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

    @model_validator(mode="before")
    @classmethod
    def _what_an_onnx_file_is_pruned_by(cls, given: Any) -> Any:
        model = given.get("model") if isinstance(given, dict) else None
        name = model.get("id") if isinstance(model, dict) else model
        if not _names_onnx_file(name):
            return given
        own = {section: given.get(section, {}) for section in _OF_ONNX}
        defaults = {name: {**_OF_ONNX[name], **keys} for name, keys in own.items() if isinstance(keys, dict)}
        return {**given, **defaults}

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that it names: files, or hub data sets."""
        named = (self.data.train, self.data.evaluate, *(source.path for source in self.recover.sources))
        return tuple(text for text in named if text)

    @model_validator(mode="after")
    def _arrays_are_for_onnx_files(self) -> Self:
        if self.data.inputs is not None and not self.model.is_onnx:
            raise ValueError("data.inputs is for an ONNX file; this model reads text")
        return self


_OF_ONNX = {"data": {"train": "", "evaluate": ""}, "prune": {"method": "one_shot", "saliency": "wanda"}}
"""Defaults of an ONNX file: it cannot be trained, and need not read text."""


def _names_onnx_file(reference: object) -> bool:
    return isinstance(reference, str) and reference.endswith(".onnx")
