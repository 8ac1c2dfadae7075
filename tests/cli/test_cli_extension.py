"""What a person's own file registers is known to every command, and part of what a run was made with."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama, traced
from typer.testing import CliRunner

from graphprune import cli, extensions
from graphprune.errors import RecipeError
from graphprune.extensions import extension_digests, load_extension
from graphprune.pipeline.stamps import start_digest
from graphprune.prune.one_shot import prune_one_shot
from graphprune.recipe import Recipe
from graphprune.saliency import registry

SALIENCY = """
import torch
from graphprune.saliency.registry import saliency


@saliency("by_number")
def by_number(evidence):
    return {name: torch.arange(group.size).float() for name, group in evidence.gates.groups.items()}
"""


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """What a test registers is forgotten after it."""
    assert registry.registered_saliencies()  # which loads those that are there by themselves
    monkeypatch.setattr(extensions, "_loaded", {})
    monkeypatch.setattr(registry, "_SALIENCIES", dict(registry._SALIENCIES))


def written(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_saliency_of_ones_own_is_known_by_its_name(tmp_path):
    load_extension(written(tmp_path, SALIENCY))
    llama = traced(tiny_llama())
    ids = torch.arange(24).reshape(2, 12) + 3
    pruned = prune_one_shot(
        llama.model, llama.groups, [ids], remove=0.1, saliency="by_number", repair="none", layout="uniform"
    )
    assert pruned.plan
    assert all(list(units) == list(range(len(units))) for units in pruned.plan.values())


def test_what_was_made_with_another_extension_is_made_again(tmp_path):
    recipe = Recipe.model_validate(
        {"model": {"id": "m"}, "data": {"train": "a.txt", "evaluate": "b.txt"}, "graphprune": 1}
    )
    before = start_digest(recipe)
    name = written(tmp_path, "x = 1\n")
    load_extension(name)
    first, (digest,) = start_digest(recipe), extension_digests()
    written(tmp_path, "x = 2\n")
    load_extension(name)
    assert len({before, first, start_digest(recipe)}) == 3
    written(tmp_path, "x = 1\n")
    load_extension(name)
    assert start_digest(recipe) == first
    assert (digest,) == extension_digests()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1 +\n", r"mine\.py, line 1: SyntaxError"),
        ("def f():\n    raise ValueError('no')\n\n\nf()\n", r"mine\.py, line 2: ValueError: no\n"),
        ("import nothing_of_that_name\n", r"line 1: ModuleNotFoundError.*nothing_of_that_name"),
    ],
)
def test_a_mistake_in_it_is_told_with_its_line(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_extension(written(tmp_path, text))
    assert not extension_digests()


@pytest.mark.parametrize(
    ("name", "message"), [("no/such.py", "no such file"), ("no_such_module", "No module named")]
)
def test_what_is_not_there_is_told(name, message):
    with pytest.raises(RecipeError, match=message):
        load_extension(name)


def test_it_stands_before_any_command_and_in_the_way_to_do_it_again(tmp_path, monkeypatch):
    first, second = written(tmp_path, "x = 1\n"), written(tmp_path, "y = 1\n", "other.py")
    seen = []
    monkeypatch.setattr(cli, "_prepared", lambda *_: seen.append(cli._command("run", None, tmp_path, "m")))
    CliRunner().invoke(cli.app, ["--extension", first, "--extension", second, "run", "r.yaml", "-o", "out"])
    assert seen == [f"graphprune --extension {first} --extension {second} run -o {tmp_path} --model m"]
