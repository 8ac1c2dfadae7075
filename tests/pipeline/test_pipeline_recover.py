"""Recovery within a run: its sources, where it goes on, the float base, and the commands that stop before the end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import words
from safetensors.torch import load_file

from graphprune.errors import RecipeError, RunFolderError, SourceError
from graphprune.pipeline.inputs import open_inputs
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.run import STAGES, run, run_until, stage_order
from graphprune.recipe_file import load_recipe
from graphprune.recover import course

SILENT = Reporter(None)
SOURCES = """recover:
  steps: 8
  rounds: 2
  patience: 5
  sources:
    - {name: wiki, path: train.txt, hold_out: 5}
    - {name: books, path: books.txt, hold_out: 6}
    - {name: asked, path: asked.jsonl, kind: instruct, hold_out: 4}
  training: {learning_rate: 1e-3, batch_size: 2, precision: float32}
"""
PLAIN = "recover: {steps: 3, training: {learning_rate: 1e-3, batch_size: 2, precision: float32}}\n"


@pytest.fixture(scope="module")
def mixed(bench):
    """A function from what is to be replaced in a recipe with three sources to the file of it."""
    (bench.folder / "books.txt").write_text(words(2, 900))
    asked = [{"prompt": words(10 + i, 3), "response": words(50 + i, 5)} for i in range(30)]
    (bench.folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))

    def made(*replaced):
        path = bench.with_recipe(sources=(PLAIN, SOURCES))
        for old, new in replaced:
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new))
        return path

    return made


def graphprune(*arguments):
    command = [sys.executable, "-m", "graphprune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def opened(recipe):
    return open_inputs(load_recipe(recipe), recipe.parent)


def rows(windows):
    return {tuple(row) for row in windows.ids.tolist()}


def test_no_stage_learns_from_what_is_held_out(mixed):
    """Pruning and calibration read the training text without the windows that a source holds out of it."""
    inputs = opened(mixed())
    assert [source.name for source in inputs.sources] == ["wiki", "books", "asked"]
    assert [len(source.held_out) for source in inputs.sources] == [5, 6, 4]
    held = set().union(*(rows(source.held_out) for source in inputs.sources))
    for windows in (inputs.train, *(source.train for source in inputs.sources)):
        assert not rows(windows) & held
    assert len(inputs.train) == len(inputs.sources[0].train)
    assert inputs.sources[2].train.labels is not None


def test_without_sources_recovery_learns_from_the_training_text(bench):
    inputs = opened(bench.recipe)
    (source,) = inputs.sources
    assert source.train is inputs.train
    assert source.held_out is None
    two = opened(bench.with_recipe(rounds=("recover: {steps: 3", "recover: {steps: 4, rounds: 2")))
    (source,) = two.sources
    assert len(source.held_out) == 16
    assert len(source.train) == len(two.train) == len(inputs.train) - 16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("name: books", "name: wiki"), RecipeError, "two are named 'wiki'"),
        (("path: books.txt", "path: evaluate.txt"), RecipeError, "source 'books' and 'evaluate.txt' share"),
        (("path: books.txt", "path: none.txt"), SourceError, "there is no text 'none.txt'"),
        (("hold_out: 6", "hold_out: 600"), SourceError, "600 are to be held out"),
        (("steps: 8", "steps: 3"), RecipeError, "recover.steps is 3, and there are 4 rounds"),
        (("kind: instruct", "kind: instructions"), RecipeError, "recover.sources.2.kind"),
        (("rounds: 2", "rounds: 2\n  floor: 1.5"), RecipeError, "recover.floor is 1.5"),
    ],
)
def test_bad_sources_are_told_before_anything_is_done(mixed, tmp_path, change, error, message):
    with pytest.raises(error) as caught:
        run_until("recover", mixed(change), tmp_path / "RUN", SILENT)
    assert message in str(caught.value)
    assert not (tmp_path / "RUN").exists()


def test_a_run_that_was_killed_between_rounds_ends_bit_for_bit_the_same(mixed, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    train, begun = course.train, []

    def dying(*args, **kwargs):
        begun.append(kwargs["span"])
        if len(begun) == 3:
            raise Killed
        return train(*args, **kwargs)

    recipe = mixed()
    run_until("recover", recipe, tmp_path / "straight", SILENT)
    with monkeypatch.context() as patch:
        patch.setattr(course, "train", dying)
        with pytest.raises(Killed):
            run_until("recover", recipe, tmp_path / "RUN", SILENT)
        begun.clear()
        patch.setattr(course, "train", lambda *a, **k: begun.append(k["span"]) or train(*a, **k))
        run_until("recover", recipe, tmp_path / "RUN", SILENT)
    assert begun == [range(4, 6), range(6, 8)]
    for name in ("adapter/adapter_model.safetensors", "quant/quant.safetensors"):
        ours, theirs = (load_file(tmp_path / run_ / name) for run_ in ("RUN", "straight"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    metrics = [(tmp_path / name / "training/metrics.jsonl").read_text() for name in ("RUN", "straight")]
    assert metrics[0] == metrics[1]


def test_on_the_pruned_base_recovery_comes_first_and_the_commands_lead_through_the_run(mixed, tmp_path):
    """Prune, recover and run, each where the one before ended; the float model opens with stock transformers."""
    from transformers import AutoModelForCausalLM

    recipe, folder = mixed(("recover:", "recover:\n  base: pruned\n  rank: 4")), tmp_path / "RUN"
    done = graphprune("prune", recipe, "-o", folder)
    assert done.returncode == 0, done.stderr
    assert f"The pruned model is {folder / 'model'}: " in done.stdout
    assert f"Go on with: graphprune recover {recipe} -o {folder}" in done.stdout
    stages = json.loads((folder / "run.json").read_text())["stages"]
    assert set(stages) == {"evaluate", "trace", "certify", "prune", "reload"}

    done = graphprune("recover", recipe, "-o", folder, "--quiet")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stdout.startswith(f"The recovered model is {folder / 'recovered'}: perplexity ")
    assert not (folder / "quant").exists()
    recovered, pruned = (
        AutoModelForCausalLM.from_pretrained(folder / name) for name in ("recovered", "model")
    )
    ours, theirs = recovered.state_dict(), pruned.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed
    assert all("_proj" in name for name in changed)

    report = run(recipe, folder, SILENT)
    order = [stage.name for stage in report.stages]
    assert order.index("recover") == order.index("quantize") - 1
    assert sorted(order) == sorted(STAGES)
    assert {stage.name for stage in report.stages if stage.state == "done"} == {"quantize", "export", "speed"}
    assert [(row.phase, row.number, row.step) for row in report.recovery] == [
        ("text", 0, 0), ("text", 1, 2), ("text", 2, 4), ("instruct", 0, 4), ("instruct", 1, 6), ("instruct", 2, 8),
    ]  # fmt: skip
    assert [row.kept for row in report.recovery].count(True) == 1
    assert (folder / "training" / "recovery.svg").read_text().startswith("<svg")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert report.perplexity.onnx <= 1.05 * report.perplexity.quantized


def test_the_order_of_the_stages_is_the_recipes(mixed, bench):
    assert stage_order(load_recipe(bench.recipe)) == list(STAGES)
    moved = stage_order(load_recipe(mixed(("recover:", "recover:\n  base: pruned"))))
    assert [name for name in moved if name != "recover"] == [name for name in STAGES if name != "recover"]
    assert moved.index("recover") == moved.index("reload") + 1


def test_a_folder_of_another_recipe_is_refused(mixed, tmp_path):
    manifest = {"schema": "graphprune.run/2", "stages": {}, "measured": {}, "fingerprint": "another"}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(RunFolderError, match="another recipe"):
        run_until("reload", mixed(), tmp_path, SILENT)
    done = graphprune("recover", mixed(), "-o", tmp_path)
    assert done.returncode == 2
    assert "holds a run of another recipe" in done.stderr
    assert "--fresh" in done.stderr
    assert json.loads((tmp_path / "run.json").read_text()) == manifest
