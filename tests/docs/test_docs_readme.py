"""The code that the documents show runs, and the paths and targets that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import tiny_llama

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


def test_the_rule_that_the_readme_shows_registers():
    from graphprune.coupling.rules import registry

    code = next(code for code in snippets(ROOT / "README.md") if "@gp.rule" in code)
    try:
        exec("import graphprune as gp\n" + code, {})
        assert registry.rule_for("mylib.scale_rows.default") is not None
    finally:
        registry._ENTRIES.pop("mylib.scale_rows.default", None)


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
