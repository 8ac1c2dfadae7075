"""From what a run measured to its report."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import psutil
import torch

from graphprune.export.agreement import LARGEST_KL, LEAST_TOP1
from graphprune.export.verify import bound_of
from graphprune.files import size_of, write_json
from graphprune.pipeline.folder import RunFolder
from graphprune.pipeline.session import Session
from graphprune.prune.timing import processor
from graphprune.report.group_page import main_picture
from graphprune.report.page import write_report
from graphprune.report.pictures import training_picture, widths_picture
from graphprune.report.recovery_picture import recovery_picture
from graphprune.report.schema import Report
from graphprune.shrink.load import is_uneven
from graphprune.source.text import Windows

_PACKAGES = (
    "graphprune",
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "networkx",
    "numpy",
)


def report_stage(session: Session, order: list[str], reused: list[str], command: str) -> None:
    """Write report.json, report.html, environment.json and the pictures.

    Args:
        session: The run, all of whose stages are done.
        order: Names of the stages, as they were done.
        reused: Stages that an earlier call had done.
        command: How to do it again.
    """
    document = json.loads(session.path("graph/groups.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in session.path("training/metrics.jsonl").read_text().splitlines()]
    report = _report(session, document["groups"], order, reused, command)
    pictures = {
        "groups": main_picture(document),
        "widths": widths_picture([width.model_dump() for width in report.widths]),
        "distribution": _drawn(session.path("graph/distribution.svg")),
        "training": training_picture(metrics),
        "recovery": recovery_picture(report.recovery),
    }
    machine = {**report.environment.model_dump(), "versions": report.versions}
    write_json(session.path("environment.json"), machine)
    paths = {
        "widths": "graph/widths.svg",
        "training": "training/curves.svg",
        "recovery": "training/recovery.svg",
    }
    write_report(session.folder.path, report, pictures, paths)


def _drawn(path: Path) -> str:
    """Return a picture that a stage drew; empty if it did not."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _report(
    session: Session, groups: list[dict[str, Any]], order: list[str], reused: list[str], command: str
) -> Report:
    measured = session.folder.manifest["measured"]
    recipe, before, after = session.recipe, measured["parameters"], measured["parameters_after"]
    content = {
        "schema": "graphprune.report/1",
        "model": {
            "name": session.inputs.source.name,
            "source": recipe.model.id,
            "architecture": (getattr(session.inputs.config, "architectures", None) or ["unknown"])[0],
            "opened_by": "graphprune.load" if is_uneven(session.path("model")) else "from_pretrained",
        },
        "parameters": {
            "before": before,
            "after": after,
            "asked_share": recipe.prune.remove,
            "removed_share": 1 - after / before,
        },
        "budget": budget_row(session.folder),
        "bytes": _bytes(session, before),
        "perplexity": _perplexity(session),
        "tokens_per_second": _speed(session),
        "distance": None,
        "certificate": certificate_row(session.folder),
        "verify": {
            **measured["verification"],
            "tolerances": _tolerances(measured["verification"]["checks"]),
        },
        "stages": stage_rows(session.folder, order, reused),
        "groups": folded(groups),
        "widths": measured["widths"],
        "generations": [
            {"prompt": prompt, "dense": dense, "compact": compact}
            for prompt, dense, compact in zip(
                recipe.report.prompts, measured["written_dense"], measured["written_compact"], strict=True
            )
        ],
        "layers_quantized": measured["layers"],
        "recovery": measured["recovery"],
        "environment": environment(),
        "versions": versions(),
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json"),
        "command": command,
        "created": session.folder.manifest["created"],
        "limits": _limits(session),
    }
    return Report.model_validate(content)


def stage_rows(folder: RunFolder, order: list[str], reused: list[str]) -> list[dict[str, Any]]:
    """Return what the report says of each stage.

    Args:
        folder: The run folder.
        order: Names of the stages, as they were done.
        reused: Stages that an earlier call had done.
    """
    recorded = folder.manifest["stages"]
    return [
        {
            "name": name,
            **{key: value for key, value in recorded[name].items() if key != "stamp"},
            "state": "reused" if name in reused else "done",
        }
        for name in order
    ]


def certificate_row(folder: RunFolder) -> dict[str, Any]:
    """Return what the report says of the certificate in a run folder."""
    certificate = json.loads((folder / "graph/certificate.json").read_text(encoding="utf-8"))
    names = ("groups", "permuted_max_error", "removed_max_error", "tolerance", "ok")
    return {name: certificate[name] for name in names}


def budget_row(folder: RunFolder) -> dict[str, Any]:
    """Return what was asked for and reached, as the plan's file has it."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return {"unit": plan["budget"], "asked_share": plan["asked"], "removed_share": plan["achieved"]}


def _bytes(session: Session, parameters: int) -> dict[str, int]:
    onnx = size_of(session.path("onnx/model.onnx")) + size_of(session.path("onnx/model.onnx.data"))
    pruned = sum(file.stat().st_size for file in session.path("model").glob("*.safetensors"))
    return {"source": session.inputs.source.weight_bytes or 4 * parameters, "pruned": pruned, "onnx": onnx}


def _perplexity(session: Session) -> dict[str, Any]:
    measured, windows = session.folder.manifest["measured"], session.inputs.evaluate
    stages = ("dense", "pruned", "quantized", "recovered", "onnx")
    return {
        **{stage: measured[f"perplexity_{stage}"] for stage in stages},
        "protocol": protocol_row(windows),
    }


def _speed(session: Session) -> dict[str, Any] | None:
    measured, tokens = session.folder.manifest["measured"], session.recipe.report.speed_tokens
    if not tokens:
        return None
    return {
        "dense_onnx_fp32": measured["speed_dense"],
        "compact_onnx": measured["speed_compact"],
        "threads": torch.get_num_threads(),
        "new_tokens": tokens,
    }


def protocol_row(windows: Windows) -> dict[str, Any]:
    """Return how perplexity is measured on a text."""
    return {
        "text": windows.name,
        "tokens": windows.tokens,
        "window": int(windows.ids.shape[1]),
        "description": (
            "documents joined by a blank line, tokenized once, cut into non-overlapping windows from the start; "
            "every token but the first of a window is predicted; exp of the mean negative log-likelihood"
        ),
    }


def _tolerances(checks: dict[str, float]) -> dict[str, float]:
    bounds = {name: bound_of(name) for name in checks}
    return {
        "top1_agreement": LEAST_TOP1,
        "kl": LARGEST_KL,
        **{name: bound for name, bound in bounds.items() if bound is not None},
    }


def folded(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fold groups that are alike into one row each, in order of first appearance."""
    counts = Counter(
        (
            row["kind"],
            row["size"],
            len(row["members"]),
            row["parameters_per_unit"],
            row["prunable"],
            row["reason"],
        )
        for row in groups
    )
    names = ("kind", "size", "members", "parameters_per_unit", "prunable", "reason")
    return [{**dict(zip(names, key, strict=True)), "count": count} for key, count in counts.items()]


def _limits(session: Session) -> list[str]:
    windows, recipe = session.inputs.evaluate, session.recipe
    prune, recover = recipe.prune, recipe.recover
    pruning = session.folder.measured("pruning_steps")
    recovery = session.folder.measured("recovered_steps") * recover.accumulate
    seen = pruning * prune.training.batch_size + recovery * recover.training.batch_size
    texts = [session.inputs.train, *(source.train for source in session.inputs.sources if recover.sources)]
    available = len({row.tobytes() for text in texts for row in text.ids.numpy()})
    return [
        f"Perplexity is measured on {windows.tokens} tokens of one text; differences of a few per cent are noise.",
        f"Training read {seen} windows of {recipe.data.window} tokens, of {available} that there are, in "
        f"{session.folder.measured('training_dtype')}: a demonstration of the method, not of what it reaches with a "
        "real training budget.",
        "Speeds are those of this machine at batch 1, the best of two alternating rounds, with whatever else it did.",
        "Nothing here measures knowledge, safety or behaviour in conversation: test what you ship.",
        *_opening(session),
    ]


def _opening(session: Session) -> list[str]:
    """Return what to know before opening the float model."""
    if not is_uneven(session.path("model")):
        return []
    return [
        "Layers of the pruned float model differ in width: stock from_pretrained does not open its folder, and "
        "graphprune.load does. The ONNX model runs as any other."
    ]


def environment() -> dict[str, Any]:
    """Return the machine that a result depends on."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    # The GPU build of onnxruntime is another package, so its version is asked of the module.
    return {name: version(name) for name in _PACKAGES} | {"onnxruntime": onnxruntime.__version__}
