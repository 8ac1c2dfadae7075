"""A change of the recipe does again what read it, and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from graphprune.errors import RunFolderError
from graphprune.pipeline import run as module
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.run import STAGES, run_until, stage_order
from graphprune.pipeline.stamps import LATER, section_digest, stage_stamps, start_digest
from graphprune.recipe import Recipe

SILENT = Reporter(None)
START = {"graphprune": 1, "data": {"train": "a.txt", "evaluate": "b.txt"}}


def stamps(**changes):
    recipe = Recipe.model_validate({**START, **changes})
    sections = {name: section_digest(recipe, name) for name in LATER}
    return stage_stamps(recipe, start_digest(recipe), sections, stage_order(recipe))


def changed(**changes):
    before, after = stamps(), stamps(**changes)
    return {name for name in STAGES if before[name] != after[name]}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({}, set()),
        ({"seed": 1}, set(STAGES)),
        ({"model": {"id": "other"}}, set(STAGES)),
        ({"data": {"train": "a.txt", "evaluate": "b.txt", "window": 8}}, set(STAGES)),
        ({"prune": {"remove": 0.1}}, set(STAGES)),
        ({"quantize": {"rank": 3}}, {"quantize", "recover", "export", "speed"}),
        ({"recover": {"steps": 3}}, {"recover", "export", "speed"}),
        ({"recover": {"base": "pruned"}}, {"quantize", "recover", "export", "speed"}),
        ({"export": {"weights": "exact"}}, {"export", "speed"}),
        ({"report": {"new_tokens": 3}}, {"evaluate", "speed"}),
    ],
)
def test_a_stage_is_stamped_by_what_it_reads(changes, again):
    assert changed(**changes) == again


def test_every_section_is_read():
    assert {*Recipe.model_fields} == {*LATER, "graphprune", "seed", "model", "data", "prune"}
    recipe = Recipe.model_validate(START)
    assert start_digest(recipe, "a") != start_digest(recipe, "b")
    assert section_digest(recipe, "recover", "a") != section_digest(recipe, "recover", "b")


def test_where_recovery_comes_first_quantization_reads_it_and_not_the_other_way_round():
    first = stamps(recover={"base": "pruned"})
    rank = stamps(recover={"base": "pruned"}, quantize={"rank": 3})
    steps = stamps(recover={"base": "pruned", "steps": 3})
    assert {name for name in first if first[name] != rank[name]} == {"quantize", "export", "speed"}
    assert {name for name in first if first[name] != steps[name]} == {
        "recover",
        "quantize",
        "export",
        "speed",
    }


def test_another_recovery_keeps_the_pruned_model_and_ends_as_if_it_had_been_the_first(
    bench, tmp_path, monkeypatch
):
    folder, fresh = tmp_path / "RUN", tmp_path / "fresh"
    run_until("reload", bench.recipe, folder, SILENT)
    shutil.copytree(folder, fresh)
    run_until("recover", bench.recipe, folder, SILENT)
    (folder / "report.html").write_text("of the other recovery")
    begun = []

    def noted(name):
        return lambda session: begun.append(name) or STAGES[name](session)

    other = bench.with_recipe(steps=("recover: {steps: 3", "recover: {steps: 2"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "STAGES", {name: noted(name) for name in STAGES})
        run_until("recover", other, folder, SILENT)
    assert begun == ["quantize", "recover"]  # recovery had written over what quantization left
    assert not (folder / "report.html").exists()
    run_until("recover", other, fresh, SILENT)
    ours, theirs = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder, fresh))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [json.loads(line) for line in (folder / "training/metrics.jsonl").read_text().splitlines()]
    assert sum(row["stage"] == "recover" for row in steps) == 2

    (folder / "adapter" / "adapter_config.json").unlink()  # lost: again from what quantization leaves
    run_until("recover", other, folder, SILENT)
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    with pytest.raises(RunFolderError, match="another recipe"):
        run_until("recover", bench.with_recipe(remove=("remove: 0.2", "remove: 0.3")), folder, SILENT)
