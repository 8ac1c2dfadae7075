"""Measure what the engine does with each architecture of `architectures.py`, and print it as a Markdown table.

python examples/architecture_table.py            # all of them; some minutes
python examples/architecture_table.py gpt2 t5    # these
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from architectures import Architecture
from tables import print_table

import graphprune as gp
from graphprune.coupling.groups import NodeGroups
from graphprune.errors import GraphPruneError

HEADER = (
    "| architecture | groups, prunable / all | certified: permuted, removed | shrinks as a module | "
    "as its graph only | ONNX front end |\n| --- | ---: | --- | --- | --- | --- |"
)


def row(name: str, architecture: Architecture) -> str:
    """Return the row of one architecture."""
    model, inputs = architecture.build(), architecture.inputs()
    try:
        groups = gp.node_groups(gp.trace(model, inputs))
    except GraphPruneError as error:
        return f"| {name} | does not trace: {error.problem[:80]} | | | | |"
    certificate = gp.certify(model, groups, inputs)
    proof = f"{certificate.permuted_max_error:.0e}, {certificate.removed_max_error:.0e}"
    forms = shrunk(model, groups, inputs)
    return (
        f"| {name} | {len(groups.prunable())} / {len(groups)} | {proof if certificate.ok else f'**fails** {proof}'} | "
        f"{listed(forms, 'module')} | {listed(forms, 'graph')} | {onnx_agreement(model, groups, inputs)} |"
    )


def shrunk(model: Any, groups: NodeGroups, inputs: dict[str, Any]) -> dict[str, str]:
    """Remove the first half of the units of all groups of a kind; return in which form that was possible."""
    forms: dict[str, str] = {}
    for kind in sorted({group.kind for group in groups.prunable()}):
        plan = gp.Plan(
            {
                group.name: range(min(group.size // 2, group.size - group.minimum))
                for group in groups.prunable()
                if group.kind == kind
            }
        )
        small = gp.shrink(model, groups, plan, inputs)
        with torch.no_grad():
            small(**inputs)
        forms[kind] = "graph" if isinstance(small, torch.fx.GraphModule) else "module"
    return forms


def listed(forms: dict[str, str], form: str) -> str:
    """Return the kinds that were shrunk in a form."""
    return ", ".join(kind for kind, found in forms.items() if found == form).replace("_", " ") or "–"


def onnx_agreement(model: Any, groups: NodeGroups, inputs: dict[str, Any]) -> str:
    """Export to ONNX, read the file, and compare its prunable groups with torch's by kind and size."""
    with tempfile.TemporaryDirectory() as folder:
        path = exported(model, groups, inputs, Path(folder) / "model.onnx")
        if path is None:
            return "torch's exporter fails"
        other = gp.node_groups(gp.trace(path))
    ours, theirs = (
        Counter((g.kind, g.size) for g in found.values() if g.prunable) for found in (groups, other)
    )
    if ours == theirs:
        return "agrees"
    lost, more = ours - theirs, theirs - ours
    return "; ".join(
        f"{word} {', '.join(f'{kind} {size} × {count}' for (kind, size), count in found.items())}"
        for word, found in (("lacks", lost), ("adds", more))
        if found
    ).replace("_", " ")


def exported(model: Any, groups: NodeGroups, inputs: dict[str, Any], path: Path) -> Path | None:
    """Write a model as ONNX, with open sizes where the exporter can; return None where it cannot at all."""
    options: dict[str, Any] = {"f": path, "dynamo": True, "opset_version": 18, "verbose": False}
    for source, given in ((groups.graph.program, {}), (model, {"kwargs": inputs})):
        try:
            torch.onnx.export(source, **given, **options)
        except Exception:  # whatever it raises: the next way is tried, and the last failure is told
            continue
        return path
    return None


if __name__ == "__main__":
    print_table(HEADER, row)
