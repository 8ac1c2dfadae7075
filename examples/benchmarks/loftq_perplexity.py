r"""Perplexity of a quantized model before and after a short training of its adapters, for several initializations.

    python examples/benchmarks/loftq_perplexity.py --output runs/loftq_perplexity.jsonl
    python examples/benchmarks/loftq_perplexity.py --only "nf2" --steps 0
    python examples/benchmarks/loftq_perplexity.py --only reconstructed --seeds 0 --keep runs/models \
        --with-c4 --steps 400 --learning-rate 4e-4 --distill 4 --output runs/reconstructed.jsonl

All linear layers but the head are quantized, whole model, blocks of 64 unless said otherwise. Perplexity on the start
of WikiText-2's test split (windows of 512 tokens); calibration and training on Wikipedia articles. Each finished row is
appended to the output, and a second run goes on behind it. Hours on two cores; `--only` and `--seeds` cut it down. With
`--keep`, what was quantized or mixed is written to that folder and read by later runs, of other steps for one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import quant
from graphprune.recipe import Recover, Training
from graphprune.recover.recovery import recover
from graphprune.recover.sources import Source
from graphprune.source.adapters import attach_adapters
from graphprune.source.demo import demo_folder
from graphprune.source.perplexity import perplexity, torch_logits
from graphprune.source.text import Windows, cut_windows, read_text

DENSE, RANK = "dense", 16
MIX_FORMATS, MIX_BATCHES = ("uint2", "uint3", "uint4"), 12
DATA = Path(__file__).parents[1] / "data"
FIRST_THIRD = tuple((rf"layers\.{index}\.", "nf4") for index in range(10))


@dataclass(frozen=True, slots=True)
class Case:
    """One initialization.

    Attributes:
        name: Shown, and how a finished row is known.
        settings: What differs from the defaults of `LoftQConfig`.
        calibrated: Whether calibration text is used.
        guided: Whether errors of the layers count by the language model's loss.
        bits: Budget of a mix of formats, in bits a weight without adapters, chosen by the language model's loss; None
            for `settings` as they are.
    """

    name: str
    settings: dict[str, Any]
    calibrated: bool = False
    guided: bool = False
    bits: float | None = None


def cases() -> list[Case]:
    """QLoRA and LoftQ at every precision, and the calibrated form at the low ones."""
    found = []
    formats: dict[str, dict[str, Any]] = {
        "nf4": {"format": "nf4"},
        "int4": {"format": "int4"},
        "uint3": {"format": "uint3"},
        "nf3": {"format": "nf3"},
        "nf4 in 10 of 30 blocks, nf2": {"format": "nf2", "formats": FIRST_THIRD},
        "nf2": {"format": "nf2"},
        "uint2": {"format": "uint2"},
    }
    for name, format in formats.items():
        found.append(Case(f"{name}: QLoRA", {**format, "iterations": 0}))
        found.append(Case(f"{name}: LoftQ", {**format, "iterations": 5}))
    double = {"iterations": 3, "scale_storage": "double"}
    found.append(Case("nf4: calibrated", {"format": "nf4", **double}, calibrated=True))
    found.append(Case("uint3: calibrated", {"format": "uint3", **double}, calibrated=True))
    found.append(Case("uint2: calibrated", {"format": "uint2", **double}, calibrated=True))
    found.append(Case("uint2: guided", {"format": "uint2", **double}, calibrated=True, guided=True))
    mixed = {"iterations": 3, "scale_storage": "double", "propagation": 0.7}
    found.append(Case("2.6 bits: guided mix", mixed, calibrated=True, guided=True, bits=2.6))
    trained = {**mixed, "reconstruction": quant.Reconstruction()}
    found.append(Case("2.6 bits: guided mix, reconstructed", trained, calibrated=True, bits=2.6))
    return found


@dataclass(frozen=True, slots=True)
class Bench:
    """The model, its texts, and how long it is trained."""

    folder: Path
    train: Windows
    calibrate: Windows
    evaluate: Windows
    steps: int
    training: Training
    keep: Path | None

    @classmethod
    def open(cls, folder: Path, given: argparse.Namespace) -> Bench:
        """Read and cut the texts."""
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def cut(files: list[str], window: int, limit: int | None) -> Windows:
            text = [document for file in files for document in read_text(str(DATA / file))]
            return cut_windows(text, tokenizer, window=window, limit=limit, name=", ".join(files))

        return cls(
            folder=folder,
            train=cut(["wikipedia.jsonl", *(["c4.jsonl.gz"] if given.with_c4 else [])], 256, None),
            calibrate=cut(["wikipedia.jsonl"], 512, given.calibration_windows),
            evaluate=cut(["wikitext2.jsonl"], 512, 16),
            steps=given.steps,
            training=Training(learning_rate=given.learning_rate, batch_size=4, distill=given.distill),
            keep=given.keep,
        )

    def model(self) -> Any:
        """Return the dense model anew, frozen: adapters alone are trained, not the embedding and norms beside them."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    def perplexity(self, model: Any) -> float:
        """Return the perplexity on the evaluation windows."""
        return perplexity(torch_logits(model), self.evaluate)

    def quantized(self, case: Case, seed: int) -> tuple[Any, float]:
        """Return a quantized model, and the CPU seconds that it took when it was made."""
        model, kept = self.model(), self.keep and self.keep / f"{case.name}, seed {seed}"
        if kept and (kept / "seconds.json").exists():
            quant.load_quantized_(model, kept)
            return model, json.loads((kept / "seconds.json").read_text())
        start = time.process_time()
        config = quant.LoftQConfig(rank=RANK, seed=seed, exclude=("lm_head",), **case.settings)
        batches = [{"input_ids": ids, "labels": ids} for ids in self.calibrate.ids.split(2)]
        if case.bits is not None:
            config = replace(config, formats=self.mix(config, case.bits, batches[:MIX_BATCHES]))
        loss = _loss if case.guided else None
        quant.loftq_model(model, config, batches if case.calibrated else None, loss=loss)
        seconds = time.process_time() - start
        if kept:
            quant.save_quantized(model, kept)
            (kept / "seconds.json").write_text(json.dumps(seconds))
        return model, seconds

    def mix(
        self, config: quant.LoftQConfig, bits: float, batches: list[dict[str, Any]]
    ) -> tuple[tuple[str, Any], ...]:
        """Return a format for each layer, so many bits a weight in all."""
        kept = self.keep and self.keep / f"{bits} bits, seed {config.seed}.json"
        if kept and kept.exists():
            return tuple((pattern, format) for pattern, format in json.loads(kept.read_text()))
        quick = replace(config, iterations=1, reconstruction=None)
        formats = quant.mix_for_bits(self.model(), quick, bits, MIX_FORMATS, batches, loss=_loss).formats
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(formats))
        return formats

    def run(self, case: Case, seed: int) -> dict[str, Any]:
        """Quantize, measure, train, measure."""
        model, seconds = self.quantized(case, seed)
        packed = [module for module in model.modules() if isinstance(module, quant.QuantLinear)]
        weights = sum(layer.in_features * layer.out_features for layer in packed)
        adapters = sum(layer.rank * (layer.in_features + layer.out_features) for layer in packed)
        codes = sum(layer.quantized.nbytes for layer in packed)
        row = {
            "case": case.name,
            "seed": seed,
            "bits a weight": round(8 * codes / weights, 3),
            "of float16, adapters in float16": round((codes + 2 * adapters) / (2 * weights), 4),
            "seconds to quantize": round(seconds),
        }
        return {**row, **self.measured(model, seed)}

    def control(self, seed: int) -> dict[str, Any]:
        """Train the dense model's adapters on the same text: what that alone does to the perplexity."""
        torch.manual_seed(seed)
        model = attach_adapters(self.model(), RANK, RANK)
        return {"case": DENSE, "seed": seed, **self.measured(model, seed)}

    def measured(self, model: Any, seed: int) -> dict[str, Any]:
        """Return the perplexity before and after the training."""
        row: dict[str, Any] = {"before": self.perplexity(model)}
        if self.steps:
            source = Source("Wikipedia", "text", self.train, None)
            recover(
                model, self.model(), Recover(steps=self.steps, training=self.training), [source], seed=seed
            )
            row["after"] = self.perplexity(model)
        return {**row, "steps": self.steps}


def main() -> None:
    """Run what is not in the output yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="transformers folder; the demo model without it")
    parser.add_argument("--output", type=Path, default=Path("runs/loftq_perplexity.jsonl"))
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=66)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--distill", type=float, default=1.0)
    parser.add_argument("--with-c4", action="store_true", help="train on C4 too; give another output then")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--keep", type=Path, help="folder of quantized models, for later runs")
    arguments = parser.parse_args()
    bench = Bench.open(arguments.model or demo_folder(), arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [json.loads(line) for line in arguments.output.read_text().splitlines()]
        if arguments.output.exists()
        else []
    )
    done = {(row["case"], row["seed"], row["steps"]) for row in rows}
    tasks: dict[str, Callable[[int], dict[str, Any]]] = {
        DENSE: bench.control,
        **{case.name: partial(bench.run, case) for case in cases()},
    }
    for (name, task), seed in product(tasks.items(), arguments.seeds):
        if arguments.only in name and (name, seed, arguments.steps) not in done:
            rows.append(task(seed))
            _append(arguments.output, rows[-1])
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=f"{bench.folder.name}, {bench.evaluate.tokens} tokens of WikiText-2")
    for row in rows:
        table.add_row(*(_shown(row.get(column, "")) for column in columns))
    Console(width=150).print(table)


def _loss(output: Any) -> Any:
    return output.loss


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) and value > 1 else str(value)


if __name__ == "__main__":
    main()
