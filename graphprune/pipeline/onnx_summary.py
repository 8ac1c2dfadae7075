"""From what a run on an ONNX file measured to its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psutil

from graphprune.export.agreement import LARGEST_KL, LEAST_TOP1
from graphprune.files import write_json
from graphprune.pipeline.onnx_session import OnnxRun
from graphprune.pipeline.onnx_stages import EXPORTED, PRUNED, onnx_bytes
from graphprune.pipeline.summary import (
    budget_row,
    certificate_row,
    environment,
    folded,
    protocol_row,
    stage_rows,
    versions,
)
from graphprune.report.group_page import main_picture
from graphprune.report.page import write_report
from graphprune.report.pictures import widths_picture
from graphprune.report.schema import Report

_NAMED = 5


def onnx_report_stage(session: OnnxRun, order: list[str], reused: list[str], command: str) -> None:
    """Write report.json, report.html, environment.json and the pictures.

    Args:
        session: The run, all of whose stages are done.
        order: Names of the stages, as they were done.
        reused: Stages that an earlier call had done.
        command: How to do it again.
    """
    document = json.loads(session.path("graph/groups.json").read_text(encoding="utf-8"))
    report = _report(session, document["groups"], order, reused, command)
    pictures = {
        "groups": main_picture(document),
        "widths": widths_picture([width.model_dump() for width in report.widths]),
    }
    write_json(
        session.path("environment.json"), {**report.environment.model_dump(), "versions": report.versions}
    )
    write_report(session.folder.path, report, pictures, {"widths": "graph/widths.svg"})


def _report(
    session: OnnxRun, groups: list[dict[str, Any]], order: list[str], reused: list[str], command: str
) -> Report:
    folder, recipe, file = session.folder, session.recipe, session.inputs.file
    measured = folder.manifest["measured"]
    before, after = measured["parameters"], measured["parameters_after"]
    content = {
        "schema": "graphprune.report/1",
        "model": {
            "name": file.stem if file.stem != "model" else file.parent.name,
            "source": recipe.model.id,
            "architecture": "ONNX decoder" if session.inputs.is_decoder else "ONNX model",
            "opened_by": "onnxruntime",
        },
        "parameters": {
            "before": before,
            "after": after,
            "asked_share": recipe.prune.remove,
            "removed_share": 1 - after / before,
        },
        "budget": budget_row(folder),
        "bytes": {
            "source": onnx_bytes(file),
            "pruned": onnx_bytes(session.path(PRUNED)),
            "onnx": onnx_bytes(session.path(EXPORTED)),
        },
        "perplexity": _perplexity(session),
        "tokens_per_second": _speed(session),
        "distance": _distance(session),
        "certificate": certificate_row(folder),
        "verify": _verification(measured["verification"]),
        "stages": stage_rows(folder, order, reused),
        "groups": folded(groups),
        "widths": measured["widths"],
        "generations": _generations(session),
        "layers_quantized": measured["layers"],
        "recovery": (),
        "environment": environment(),
        "versions": versions(),
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json"),
        "command": command,
        "created": folder.manifest["created"],
        "limits": list(_limits(session)),
    }
    return Report.model_validate(content)


def _perplexity(session: OnnxRun) -> dict[str, Any] | None:
    if not session.inputs.is_decoder or session.inputs.evaluate is None:
        return None
    measured = session.folder.manifest["measured"]
    return {
        **{stage: measured[f"perplexity_{stage}"] for stage in ("dense", "pruned", "quantized", "onnx")},
        "recovered": None,
        "protocol": protocol_row(session.inputs.evaluate),
    }


def _speed(session: OnnxRun) -> dict[str, Any] | None:
    measured = session.folder.manifest["measured"]
    if "speed_compact" not in measured or not session.recipe.report.speed_tokens:
        return None
    return {
        "dense_onnx_fp32": measured["speed_dense"],
        "compact_onnx": measured["speed_compact"],
        "threads": psutil.cpu_count(logical=False) or 1,  # which is what onnxruntime takes
        "new_tokens": session.recipe.report.speed_tokens,
    }


def _distance(session: OnnxRun) -> dict[str, Any] | None:
    if session.inputs.is_decoder:
        return None
    measured = session.folder.manifest["measured"]
    return {
        "pruned": measured["distance_pruned"],
        "onnx": measured["distance_onnx"],
        "inputs": _inputs(session),
    }


def _inputs(session: OnnxRun) -> str:
    """Return in words what outputs were compared on."""
    if session.inputs.evaluate is not None:
        return f"{len(session.inputs.evaluate)} windows of {session.inputs.evaluate.name}"
    return str(session.recipe.data.inputs) if session.inputs.arrays else "inputs drawn at random"


def _verification(measured: dict[str, Any]) -> dict[str, Any]:
    bounds = {name: bound for name, _, bound in measured["checks"] if bound is not None}
    is_decoder = "kl" in measured
    return {
        "max_abs_error": measured.get("max_abs_error"),
        "top1_agreement": measured.get("top1_agreement"),
        "kl": measured.get("kl"),
        "tokens": measured.get("tokens", 0),
        "checks": {name: value for name, value, _ in measured["checks"]},
        "tolerances": bounds | ({"top1_agreement": LEAST_TOP1, "kl": LARGEST_KL} if is_decoder else {}),
    }


def _generations(session: OnnxRun) -> list[dict[str, str]]:
    measured = session.folder.manifest["measured"]
    written = zip(measured.get("written_dense", ()), measured.get("written_compact", ()))
    return [
        {"prompt": prompt, "dense": dense, "compact": compact}
        for prompt, (dense, compact) in zip(session.recipe.report.prompts, written)
    ]


def _limits(session: OnnxRun) -> Iterator[str]:
    inputs = session.inputs
    if inputs.train is not None:
        count = min(session.recipe.prune.calibration_windows, len(inputs.train))
        yield (
            f"Units were scored on {count} windows of {inputs.train.ids.shape[1]} tokens, and nothing was trained: "
            "recovery takes the model's transformers folder."
        )
    elif not inputs.arrays:
        yield (
            "Units were scored on inputs drawn at random, which tell of scales and not of what the model is for: give "
            "data.inputs, or text."
        )
    if inputs.is_decoder and inputs.evaluate is not None:
        yield (
            f"Perplexity is measured on {inputs.evaluate.tokens} tokens of one text; differences of a few per cent "
            "are noise."
        )
    left = session.folder.measured("left")
    if left:
        named = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:_NAMED])
        more = "; …" if len(left) > _NAMED else ""
        yield f"{len(left)} weights stay in float ({named}{more})."
    yield "Speeds are those of this machine at batch 1, with whatever else it did."
    yield "Nothing here measures knowledge, safety or fitness for a purpose: test what you ship."
