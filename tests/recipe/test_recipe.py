from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from graphprune.errors import RecipeError
from graphprune.recipe_file import dump_recipe, load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
GOOD = "graphprune: 1\ndata: {train: a.txt, evaluate: b.txt}\n"


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_that_ships_is_valid(path):
    assert load_recipe(path).graphprune == 1


def test_there_are_recipes_that_ship():
    assert (EXAMPLES / "demo.yaml").is_file()


def test_a_resolved_recipe_reads_back_the_same(tmp_path):
    recipe = load_recipe(EXAMPLES / "demo.yaml")
    again = load_recipe(written(tmp_path, dump_recipe(recipe)))
    assert again == recipe


def test_numbers_are_read_as_yaml_1_2_has_them(tmp_path):
    recipe = load_recipe(
        written(tmp_path, GOOD + "seed: 012\nprune: {remove: 2e-1, training: {learning_rate: 3e-4}}\n")
    )
    assert (recipe.seed, recipe.prune.remove, recipe.prune.training.learning_rate) == (12, 0.2, 3e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "prune: {remvoe: 0.2}\n", "recipe.yaml:3: unknown key 'prune.remvoe'\n  → did you mean 'remove'"),
        (GOOD + "nonsense: 1\n", "recipe.yaml:3: unknown key 'nonsense'"),
        (
            GOOD + "recover: {sources: [{name: a, path: a.txt, hold_outs: 3}]}\n",
            "unknown key 'recover.sources.0.hold_outs'\n  → did you mean 'hold_out'",
        ),
        (GOOD + "recover: {sources: [a.txt]}\n", "input should be a mapping of keys"),
        (GOOD + "prune: {kinds: ffn}\n", "input should be a list"),
        (GOOD + "prune: {distribution: {unprunable: 0.3}}\n", "without ratios nothing is measured"),
        (GOOD + "prune: {distribution: {ratios: [0.5], unprunable: 0.3}}\n", "set prune.layout to per_layer"),
        (GOOD + "prune: {loraprune: {warmup: 0.6, cooldown: 0.5}}\n", "leaves no step in which units go"),
        (GOOD + "prune: {method: blocks, repair: bias}\n", "with method blocks nothing reads prune.repair"),
        (
            GOOD + "prune: {method: one_shot, periods: 9, settle_steps: 3}\n",
            "with method one_shot nothing reads prune.periods, prune.settle_steps",
        ),
        (GOOD + "prune: {method: loraprune, half_space: 0.1}\n", "nothing reads prune.half_space"),
        (GOOD + "prune: {loraprune: {steps: 9}}\n", "with method lhspg nothing reads prune.loraprune"),
        (GOOD + "export: {profile: portable, cache: shared}\n", "with export.profile portable there is only growing"),
        (GOOD + "prune: {paper: {gamma: 0.5}}\n", "with mode gated nothing reads prune.paper"),
        (GOOD + "prune:\n  rank: 4\n  remove: 1.5\n", "recipe.yaml:5: prune.remove is 1.5"),
        (GOOD + "prune: {remove: -0.1}\n", "prune.remove is -0.1"),
        (GOOD + "prune: {remove: 0}\n", "prune.remove is 0"),
        (GOOD + "prune: {remove: 1}\n", "prune.remove is 1"),
        (GOOD + "prune: {remove: .nan}\n", "prune.remove"),
        (GOOD + "prune: {rank: 2.5}\n", "prune.rank is 2.5"),
        (GOOD + "prune: {rank: true}\n", "prune.rank is true"),
        (GOOD + "seed: on\n", "seed is \"on\""),
        (GOOD + "seed: 1\nseed: 2\n", "recipe.yaml:4: key 'seed' stands twice"),
        ("graphprune: 1\n", "key 'data' is missing"),
        (GOOD + "model: {id: demo, tokenizer: tokenizer.json}\n", "only a .onnx file is told its tokenizer"),
        ("graphprune: 1\ndata: {train: a, evaluate: b, inputs: x.npz}\n", "data.inputs is for an ONNX file"),
        (GOOD + "model: [a.onnx]\n", "input should be a mapping of keys"),
        ("graphprune: 2\ndata: {train: a, evaluate: b}\n", "graphprune is 2"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("a: [1\n", "is not YAML"),
        ("a: !!python/object:os.system x\ngraphprune: 1\n", "unknown key 'a'"),
        (b"\xff\xfe", "cannot read the recipe"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_line_and_key(tmp_path, text, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    assert message in str(caught.value)
    assert "→" in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_nothing_in_a_recipe_is_executed(tmp_path):
    marker = tmp_path / "executed"
    text = f"{GOOD}model: {{id: !!python/object/apply:pathlib.Path.touch ['{marker}']}}\n"
    with pytest.raises(RecipeError):
        load_recipe(written(tmp_path, text))
    assert not marker.exists()


def test_the_demo_recipe_names_every_section():
    sections = set(yaml.safe_load((EXAMPLES / "demo.yaml").read_text()))
    assert {"model", "data", "prune", "quantize", "recover", "export", "report"} <= sections


def test_a_model_can_be_named_in_one_word_and_replaced(tmp_path):
    path = written(tmp_path, GOOD + "model: ./mine\n")
    assert load_recipe(path).model == load_recipe(written(tmp_path, GOOD + "model: {id: ./mine}\n")).model
    assert load_recipe(path, {"model.id": "other"}).model.id == "other"


def test_an_onnx_file_needs_no_text_and_is_pruned_in_one_shot(tmp_path):
    recipe = load_recipe(None, {"model.id": "a.onnx"})
    assert (recipe.data.train, recipe.prune.method, recipe.prune.saliency) == ("", "one_shot", "wanda")
    assert recipe.model.is_onnx
    given = load_recipe(written(tmp_path, GOOD + "model: a.onnx\nprune: {saliency: flap, method: lhspg}\n"))
    assert (given.data.train, given.prune.method, given.prune.saliency) == ("a.txt", "lhspg", "flap")
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe
    assert load_recipe(written(tmp_path, GOOD)).prune.method == "lhspg"


def test_the_onnx_recipe_has_every_setting_that_such_a_run_reads_and_no_other(tmp_path):
    from graphprune.pipeline.onnx_inputs import READ, check_settings

    path = EXAMPLES / "onnx.yaml"
    content = yaml.safe_load(path.read_text())
    check_settings(load_recipe(path))
    others = {"prune": {"rank": 3}, "quantize": {"rank": 3}, "export": {"adapters": "merged"}}
    for section, change in others.items():
        changed = {**content, section: {**content[section], **change}}
        with pytest.raises(RecipeError, match=f"nothing reads {section}.{next(iter(change))}"):
            check_settings(load_recipe(written(tmp_path, yaml.safe_dump(changed))))
    for section, read in READ.items():
        assert set(content.get(section, ())) == read
