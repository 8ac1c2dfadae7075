"""One engine for architectures that it knows nothing of: golden tables of groups, and the certificate of each.

A certificate proves that no group is too small; that none is lost, or pinned without need, only a table can tell.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES

from graphprune.certify.certificate import certify
from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.trace.model import trace

GOLDEN: dict[str, list[list[Any]]] = json.loads(
    (Path(__file__).parent / "golden_groups.json").read_text(encoding="utf-8")
)


# Whose operators others here have as well.
ALIKE = {
    *(
        "llama, multi-head",
        "llama, multi-query",
        "mistral",
        "qwen2",
        "olmo2",
        "roberta",
        "distilbert",
        "gpt-j",
    ),
    *("glm", "cohere", "opt", "falcon", "bart", "clip, vision", "qwen2-moe", "mamba2"),
    *("llama + two adapters", "llama + LoRA on embeddings"),
}


def table(groups: NodeGroups) -> list[list[Any]]:
    """Return kind, units, members, why unprunable, and how many such groups there are."""
    rows = Counter((g.kind, g.size, len(g.members), g.reason or "") for g in groups.values())
    return sorted([*row, count] for row, count in rows.items())


def test_every_architecture_has_a_table():
    assert set(GOLDEN) == set(ARCHITECTURES)
    assert set(ARCHITECTURES) > ALIKE


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in ARCHITECTURES]
)
def test_groups_of_an_architecture(name):
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    groups = node_groups(trace(model, inputs))
    assert table(groups) == GOLDEN[name]
    certificate = certify(model, groups, inputs)
    certificate.raise_if_failed()
    assert certificate.removed_effect > 1e-3
    assert certificate.pruned_groups == sum(group.prunable for group in groups.values())
