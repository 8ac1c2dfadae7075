"""Pruning methods side by side: perplexity, distance from the dense model, accuracies; without and with recovery.

    python examples/benchmarks/pruning.py --output runs/pruning.jsonl
    python examples/benchmarks/pruning.py --only "LHSPG" --remove 0.2 --seeds 0 1 2 --questions 100

Every method removes the same share of the parameters, and every row with recovery has seen as many tokens: what a
method trains while it prunes is taken off its recovery. The dense model with the same recovery is a row. Calibration
and training on Wikipedia articles and C4; judged on WikiText-2 (raw test split, windows of 1,024 tokens from its start)
and on C4 documents that nothing is learned from. KL is that of the dense model's next-token distribution from the
pruned one's, on the latter. Each finished row is appended to the output, and a second run goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import graphprune as gp
from graphprune.prune.budget import Budget
from graphprune.prune.methods.registry import Task, method_named
from graphprune.prune.precision import computing_in_bfloat16, use_bfloat16
from graphprune.prune.target import recipe_budget, recipe_distribution
from graphprune.prune.training import Objective, logits_of, train
from graphprune.recipe import Prune, Training
from graphprune.saliency.blocks import block_influence
from graphprune.shrink.blocks import drop_blocks
from graphprune.source.adapters import attach_adapters
from graphprune.source.demo import demo_folder
from graphprune.source.model import example_inputs
from graphprune.source.perplexity import perplexity, torch_logits
from graphprune.source.questions import answer, read_questions
from graphprune.source.text import Windows, cut_windows, read_text

DATA = Path(__file__).parents[1] / "data"
RATE = 1e-3
BATCH, WINDOW = 4, 256
WHILE_PRUNING = 0.6  # of the training steps, for methods that train while they prune
# As published, heads and channels lose alike.
PUBLISHED: dict[str, Any] = {"method": "one_shot", "repair": "none", "normalise": "kind"}


@dataclass(frozen=True, slots=True)
class Case:
    """A method: the recipe's settings that make it, or another way to a smaller model.

    Attributes:
        name: Shown, and how a finished row is known.
        settings: Of the recipe's `prune` section.
        kind: ``units``, ``blocks`` (ShortGPT) or ``dense`` (nothing is removed).
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "units"

    @property
    def trains(self) -> bool:
        """Whether the method trains while it prunes."""
        return self.kind == "units" and self.settings.get("method") != "one_shot"


CASES = (
    Case("dense", kind="dense"),
    Case("random", {**PUBLISHED, "saliency": "random"}),
    Case("magnitude", {**PUBLISHED, "saliency": "magnitude"}),
    Case("LLM-Pruner, vector", {**PUBLISHED, "saliency": "taylor_vector"}),
    Case("LLM-Pruner, element¹", {**PUBLISHED, "saliency": "taylor_first"}),
    Case("LLM-Pruner, element²", {**PUBLISHED, "saliency": "taylor_second"}),
    Case("Wanda-sp", {**PUBLISHED, "saliency": "wanda"}),
    Case("FLAP", {**PUBLISHED, "saliency": "flap", "repair": "bias", "layout": "per_layer"}),
    Case("ShortGPT", kind="blocks"),
    Case("Fisher, repaired", {"method": "one_shot", "saliency": "fisher"}),
    Case("Wanda, repaired", {"method": "one_shot", "saliency": "wanda"}),
    Case("LLM Surgeon's scores, repaired", {"method": "one_shot", "saliency": "surgeon"}),
    Case(
        "LLM Surgeon's scores, channels alone, repaired",
        {"method": "one_shot", "saliency": "surgeon", "kinds": ("ffn",)},
    ),
    Case("FLAP's scores, repaired", {"method": "one_shot", "saliency": "flap"}),
    Case("Fisher, repaired, per layer", {"method": "one_shot", "saliency": "fisher", "layout": "per_layer"}),
    Case(
        "Wanda, repaired, by the knowledge distribution",
        {
            **{"method": "one_shot", "saliency": "wanda", "layout": "per_layer"},
            "distribution": {"ratios": (0.3,)},
        },
    ),
    Case("LoRAPrune", {"method": "loraprune", "repair": "none", "training": {"distill": 0.0}}),
    Case("LHSPG, paper mode", {"method": "lhspg", "mode": "paper"}),
    Case("LHSPG, gated", {"method": "lhspg"}),
    Case("LHSPG, gated, per layer", {"method": "lhspg", "layout": "per_layer"}),
)


class Bench:
    """The dense model, the texts, and what a method is judged by.

    Args:
        given: The command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.folder: Path = given.model or demo_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        learned = [*read_text(str(DATA / "wikipedia.jsonl")), *read_text(str(DATA / "c4.jsonl.gz"))]
        self.train = cut_windows(learned, self.tokenizer, window=WINDOW, limit=None, name="Wikipedia and C4")
        self.wikitext = self._judged_by("wikitext2_raw.txt.gz", given.windows)
        self.c4 = self._judged_by("c4_held_out.jsonl.gz", given.c4_windows)

    def _judged_by(self, file: str, limit: int) -> Windows:
        return cut_windows(read_text(str(DATA / file)), self.tokenizer, window=1024, limit=limit, name=file)

    def model(self) -> Any:
        """Return the dense model anew."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def dense(self) -> Any:
        """The dense model, to compare with and to learn from; nothing changes it."""
        return self.model().requires_grad_(False)

    @cached_property
    def dense_c4(self) -> list[Tensor]:
        """Log-probabilities of the dense model on C4, a window each."""
        logits = torch_logits(self.dense)
        return [logits(ids)[:, :-1].log_softmax(-1) for ids in self.c4.ids.split(1)]

    def judge(self, model: Any) -> dict[str, float]:
        """Return perplexities, KL from the dense model in nats a token, and accuracies."""
        logits = torch_logits(model)
        loss = divergence = 0.0
        for ids, dense in zip(self.c4.ids.split(1), self.dense_c4, strict=True):
            ours = logits(ids)[:, :-1].log_softmax(-1)
            loss -= float(ours.gather(-1, ids[:, 1:, None]).sum())
            divergence += float((dense.exp() * (dense - ours)).sum())
        found = {
            "WikiText-2": perplexity(logits, self.wikitext, 1),
            "C4": math.exp(loss / self.c4.tokens),
            "KL": divergence / self.c4.tokens,
        }
        for path in sorted((DATA / "zero_shot").iterdir()) if self.given.questions else ():
            questions = read_questions(path, self.given.questions)
            found[path.name.partition(".")[0].rpartition("_")[0]] = answer(
                logits, self.tokenizer, questions
            ).right
        return found


def prune(bench: Bench, case: Case, remove: float, seed: int, steps: int) -> tuple[Any, int]:
    """Return the smaller model, and how many training steps it has seen."""
    if case.kind == "dense":
        return bench.model(), 0
    if case.kind == "blocks":
        return without_blocks(bench, remove, seed), 0
    settings = Prune(**scheduled(case, remove, steps))
    torch.manual_seed(seed)
    dense = bench.model()
    own = {id(parameter) for parameter in dense.parameters()}
    examples = example_inputs(dense)
    model = attach_adapters(dense, settings.rank, settings.alpha)
    counted = frozenset(name for name, parameter in model.named_parameters() if id(parameter) in own)
    groups = gp.node_groups(gp.trace(model, examples))

    def allot(scores: Mapping[str, Tensor]) -> Budget:
        distribution = recipe_distribution(model, groups, settings, bench.train, scores, seed=seed)
        return recipe_budget(groups, settings, scores, counted=counted, distribution=distribution)

    task = Task(
        model, groups, settings, bench.train,
        allot=allot,
        example_inputs=examples, seed=seed, announce=silent,
    )  # fmt: skip
    pruned = method_named(settings.method)(task)
    small: Any = pruned.cut(lambda: gp.shrink(model, groups, pruned.plan, examples, form="module"))
    return small.merge_and_unload(), len(pruned.metrics)


def scheduled(case: Case, remove: float, steps: int) -> dict[str, Any]:
    """Return a method's settings with its share of the training steps spread over its schedule."""
    training = {"learning_rate": RATE, "batch_size": BATCH, **case.settings.get("training", {})}
    # Steps of 16 channels let all methods come within half a per cent of the share.
    found = {"remove": remove, "rank": 16, "alpha": 32, "width_multiple": {"ffn": 16}, **case.settings}
    found["training"] = training
    within = round(WHILE_PRUNING * steps)
    if found.get("method") == "loraprune":
        found["loraprune"] = {"steps": within, "every": max(1, within // 12)}
    elif case.trains:
        periods = 5
        period = max(1, round(0.7 * within / periods))
        warmup = round(0.1 * within)
        found.update(
            warmup_steps=warmup, periods=periods, period_steps=period,
            settle_steps=max(0, within - warmup - periods * period),
        )  # fmt: skip
    return found


def without_blocks(bench: Bench, remove: float, seed: int) -> Any:
    """Return the model without its least influential blocks, as many as come nearest to the share (ShortGPT)."""
    model = bench.model()
    influence = block_influence(model, bench.train.drawn(32, seed).split(1))
    before = sum(parameter.numel() for parameter in model.parameters())
    order = influence.argsort().tolist()
    one = drop_blocks(model, order[:1])
    share = 1 - sum(parameter.numel() for parameter in one.parameters()) / before
    return drop_blocks(model, order[: max(1, round(remove / share))])


def recovered(bench: Bench, model: Any, steps: int, seed: int) -> Any:
    """Train adapters on a model for some steps, on the text and on the dense model's predictions, and merge them."""
    if not steps:
        return model
    training = Training(learning_rate=RATE, batch_size=BATCH, distill=1.0)
    torch.manual_seed(seed)
    adapted = attach_adapters(model, 16, 32)
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    bfloat16 = use_bfloat16(training, adapted)

    def teacher(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = bench.dense(input_ids=ids, use_cache=False).logits
            return logits

    with computing_in_bfloat16(adapted, bfloat16):
        train(
            bench.train.batches(BATCH, seed + 1),
            Objective(logits_of(adapted), teacher, training.distill, bfloat16),
            torch.optim.AdamW(adapters, lr=RATE, weight_decay=0.0),
            steps=steps,
            warmup=max(1, steps // 20),
            trainable=adapters,
        )
    return adapted.merge_and_unload().eval()


def silent(title: str, total: int | None) -> AbstractContextManager[Callable[..., None]]:
    """Show nothing of what a method does."""
    return nullcontext(lambda done, words="": None)


def rows_of(bench: Bench, case: Case, remove: float, seed: int, steps: int) -> list[dict[str, Any]]:
    """Return a method's row without recovery (where it can do without training) and its row with it."""
    start = time.process_time()
    before = sum(parameter.numel() for parameter in bench.dense.parameters())
    rows = []

    def row(model: nn.Module, trained: int) -> dict[str, Any]:
        removed = 1 - sum(parameter.numel() for parameter in model.parameters()) / before
        return {
            "method": case.name, "asked": remove, "seed": seed, "steps": steps, "tokens": trained * BATCH * WINDOW,
            "removed": round(removed, 4), **bench.judge(model), "CPU seconds": round(time.process_time() - start),
        }  # fmt: skip

    model, seen = prune(bench, case, remove, seed, steps)
    rows.append(row(model, seen))
    if steps:
        rows.append(row(recovered(bench, model, steps - seen, seed), steps))
    return rows


def main() -> None:
    """Run what is not in the output yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="transformers folder; the demo model without it")
    parser.add_argument("--output", type=Path, default=Path("runs/pruning.jsonl"))
    parser.add_argument("--only", nargs="+", default=[""], help="methods, or parts of their names")
    parser.add_argument("--remove", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--steps", type=int, default=100, help="of training, in all; 0 for methods that need none"
    )
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--c4-windows", type=int, default=8)
    parser.add_argument("--questions", type=int, default=0, help="of each zero-shot task, up to 200")
    given = parser.parse_args()
    bench = Bench(given)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.exists() else []
    )
    done = {(row["method"], row["asked"], row["seed"], row["steps"]) for row in rows}
    for seed in given.seeds:
        for remove in given.remove:
            for case in CASES:
                asked = 0.0 if case.kind == "dense" else remove
                wanted = any(_means(part, case.name) for part in given.only)
                possible = given.steps or not case.trains
                if wanted and possible and (case.name, asked, seed, given.steps) not in done:
                    found = rows_of(bench, case, asked, seed, given.steps)
                    done.add((case.name, asked, seed, given.steps))
                    rows.extend(found)
                    with given.output.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(row) + "\n" for row in found)
    show(bench, rows)


def _means(part: str, name: str) -> bool:
    """Whether a part of a name, which means no other if it is a whole one, means a method."""
    return part == name if any(part == case.name for case in CASES) else part in name


def show(bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Print all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    title = f"{bench.folder.name}; WikiText-2 {bench.wikitext.tokens} tokens, C4 {bench.c4.tokens}"
    table = Table(*columns, title=title)
    for row in sorted(rows, key=lambda row: (row["asked"], row["tokens"] > 0, row["WikiText-2"])):
        table.add_row(*(_shown(row.get(column, "")) for column in columns))
    Console(width=200).print(table)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
