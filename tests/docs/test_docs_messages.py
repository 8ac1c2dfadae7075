"""What is told to a caller of the library is in the library's words; a recipe's keys stand in brackets behind them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import graphprune
from graphprune.recipe import Recipe

ROOT = Path(graphprune.__file__).parent
FOR_RECIPES = (
    "pipeline/", "cli.py", "recipe.py", "recipe_file.py",
    "prune/methods/", "prune/target.py", "recover/course.py", "recover/sources.py"
)  # fmt: skip
"""Called with recipes alone."""
SECTIONS = "|".join(
    name for name in (*Recipe.model_fields, "training") if name not in ("graphprune", "model")
)
KEY = re.compile(rf"(?<![\w./])({SECTIONS})\.[a-z]\w+|\bin the recipe\b")
MODULES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not path.relative_to(ROOT).as_posix().startswith(FOR_RECIPES)
]


def messages(source):
    """Yield (line, literal text) of all that is raised, or returned as an error."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split("(")[0].split(".")[0].endswith(
            "Error"
        ):
            literals = [
                item.value
                for item in ast.walk(node)
                if isinstance(item, ast.Constant) and isinstance(item.value, str)
            ]
            yield node.lineno, " ".join(literals)


def in_recipe_words(text):
    return KEY.search(re.sub(r"\(recipe: [^)]*\)", "", text))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_errors_speak_to_both_doors(path):
    found = [(line, text) for line, text in messages(path.read_text()) if in_recipe_words(text)]
    assert found == []


def test_the_search_finds_what_it_is_for():
    source = 'raise BudgetError("too much", f"lower prune.keep_at_least to {x}")'
    ((_, text),) = messages(source)
    assert in_recipe_words(text)
    assert not in_recipe_words("lower keep_at_least (recipe: prune.keep_at_least)")
    assert not in_recipe_words("see graphprune.prune.budget and param.data.to")
