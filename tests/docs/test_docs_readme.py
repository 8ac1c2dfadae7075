"""The code that the documents show runs, and the paths and targets that they name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

import graphprune as gp
from graphprune.source.model import example_inputs

ROOT = Path(__file__).parents[2]


def snippets(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S)


def test_the_library_snippet_runs():
    code = snippets(ROOT / "README.md")[0]
    model = tiny_llama()
    names = {"model": model, "example_inputs": example_inputs(model)}
    exec(code, names)
    small = names["small"]
    assert small.model.layers[0].mlp.gate_proj.out_features == 46
    assert model.model.layers[0].mlp.gate_proj.out_features == 48


@pytest.fixture
def rules():
    from graphprune.coupling.rules import registry

    before = dict(registry._ENTRIES)
    yield registry
    registry._ENTRIES.clear()
    registry._ENTRIES.update(before)
    registry._entry.cache_clear()


def test_the_rule_that_the_readme_shows_registers(rules):
    code = next(code for code in snippets(ROOT / "README.md") if "@gp.rule" in code)
    exec("import graphprune as gp\n" + code, {})
    assert rules.rule_for("mylib.scale_rows.default") is not None


class Scaled(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(4, 9), nn.Linear(9, 3), nn.Parameter(torch.rand(9) + 0.5)
        self.norm = norm or nn.Identity()

    def forward(self, x):
        return self.down(self.norm(torch.ops.mylib.scale_rows(self.up(x), self.scale)))


@pytest.mark.parametrize("told", [True, False])
def test_the_rule_that_the_readme_shows_lets_a_norm_lose_units(rules, told):
    """Without `vanishes`, the reason names the operator whose rule does not say it."""
    (engine,) = snippets(ROOT / "graphprune" / "coupling" / "README.md")
    exec(engine.split("@gp.rule")[0], {})
    code = next(code for code in snippets(ROOT / "README.md") if "@gp.rule" in code)
    exec("import graphprune as gp\n" + (code if told else code.replace(', vanishes="any"', "")), {})
    model, inputs = Scaled(nn.RMSNorm(9)).double(), {"x": torch.randn(5, 4).double()}
    groups = gp.node_groups(gp.trace(model, inputs))
    width = next(group for group in groups.values() if group.size == 9)
    assert width.prunable is told
    if told:
        gp.certify(model, groups, inputs).raise_if_failed()
    else:
        assert width.reason.endswith("by its rule, mylib.scale_rows.default need not leave zero as zero")


def test_an_operator_of_ones_own_gets_a_rule_by_the_engines_readme(rules):
    (code,) = snippets(ROOT / "graphprune" / "coupling" / "README.md")
    definition, rule = code.split("@gp.rule")
    names: dict[str, Any] = {}
    exec(definition, names)
    model, inputs = Scaled(), {"x": torch.randn(5, 4)}
    graph = gp.trace(model, inputs)
    width = next(group for group in gp.node_groups(graph).values() if group.size == 9)
    assert width.reason == "operator mylib.scale_rows.default has no rule"
    exec("@gp.rule" + rule, names)
    groups = gp.node_groups(graph)
    assert [group.size for group in groups.prunable()] == [9]
    gp.certify(model, groups, inputs).raise_if_failed()


def test_the_snippet_of_quant_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code in snippets(ROOT / "quant" / "README.md"):
        exec(code, {})
    assert (tmp_path / "packed" / "quant.json").is_file()


@pytest.mark.parametrize("document", ["README.md", "quant/README.md", "examples/data/LICENSES.md"])
def test_links_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert link.startswith("http") or (path.parent / link).exists(), link


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(
        re.findall(r"make (?:\w+=\S+ )*([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    ):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_texts_that_ship_are_small_and_disjoint():
    import json

    folder = ROOT / "examples" / "data"
    files = sorted(folder.glob("*.jsonl"))
    assert sum(file.stat().st_size for file in files) <= 1_000_000
    first, second = ({json.loads(line)["text"] for line in file.read_text().splitlines()} for file in files)
    assert not first & second
