"""What cannot be done is refused before anything slow, and widths that a class refuses are left out."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from pruning_settings import prunes_by
from tiny_models import randomized, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import graphprune as gp
from graphprune.errors import (
    BudgetError,
    ExportError,
    RecipeError,
    RefusedWidthsError,
    ShrinkError,
    TrainingError,
)
from graphprune.export.shared_cache import check_attention
from graphprune.pipeline import run as module
from graphprune.pipeline.folder import open_run_folder
from graphprune.pipeline.inputs import open_inputs
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.run import STAGES, run_until
from graphprune.pipeline.session import Session
from graphprune.pipeline.stages import rehearse
from graphprune.recipe_file import load_recipe

from conftest import save_tokenizer  # isort: skip

SILENT = Reporter(None)


@pytest.fixture(scope="module")
def many_heads(bench, tmp_path_factory):
    """A Llama of eight heads in a hidden size of 32, of which its configuration allows 1, 2, 4 and 8."""
    folder = tmp_path_factory.mktemp("heads") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "HEADS", 8)
        patch.setattr(tiny_models, "KV_HEADS", 8)
        tiny_llama(seed=4).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def session(bench, tmp_path_factory):
    """A run whose model is traced; tests set its recipe."""
    inputs = open_inputs(load_recipe(bench.recipe), bench.recipe.parent)
    with open_run_folder(tmp_path_factory.mktemp("session"), inputs.fingerprint) as folder:
        yield Session(inputs, folder, SILENT)


@pytest.fixture
def nothing_slow(monkeypatch):
    """Fail if a stage after tracing is begun."""

    def slow(session):
        raise AssertionError("something slow was begun")

    monkeypatch.setattr(module, "STAGES", {**dict.fromkeys(STAGES, slow), "trace": STAGES["trace"]})


def changed(bench, model=None, **replacements):
    if model is not None:
        replacements["model"] = ("id: tiny", f"id: {model}")
    return bench.with_recipe(**replacements)


def pruned(recipe, folder):
    return run_until("reload", recipe, folder, SILENT)


def test_a_number_of_heads_that_the_configuration_refuses_is_left_out(bench, many_heads, tmp_path):
    """For a tenth of the parameters 6 of 8 heads would stay; 32 is no multiple of 6."""
    recipe = changed(bench, many_heads, share=("remove: 0.2", "remove: 0.1\n  keep_at_least: 0.5"))
    pruned(recipe, tmp_path / "RUN")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "RUN" / "model")
    assert 32 % small.config.num_attention_heads == 0
    plan = json.loads((tmp_path / "RUN" / "plan.json").read_text())
    assert abs(plan["achieved"] - 0.1) < 0.08


def test_where_no_other_number_will_do_it_is_refused_before_anything_slow(
    bench, many_heads, tmp_path, nothing_slow
):
    recipe = changed(
        bench,
        many_heads,
        share=("remove: 0.2", "remove: 0.1\n  kinds: [attention_heads]\n  keep_at_least: 0.6"),
    )
    with pytest.raises(BudgetError, match=r"stock LlamaConfig refuses \(attention_heads: .*6") as caught:
        pruned(recipe, tmp_path / "RUN")
    assert "prune.layout to per_layer" in caught.value.remedy


def test_per_layer_such_heads_come_through_to_gp_load(bench, many_heads, tmp_path):
    share = "remove: 0.1\n  kinds: [attention_heads]\n  keep_at_least: 0.6\n  layout: per_layer"
    pruned(changed(bench, many_heads, share=("remove: 0.2", share)), tmp_path / "RUN")
    plan = json.loads((tmp_path / "RUN" / "plan.json").read_text())["removed"]
    assert any(32 % (8 - len(units)) for units in plan.values())
    small = gp.load(tmp_path / "RUN" / "model")
    for name, units in plan.items():
        layer = int(name.partition("layers.")[2].partition(".")[0])
        width = small.model.layers[layer].self_attn.o_proj.in_features
        assert width == small.model.layers[layer].self_attn.o_proj.weight.shape[1] == 4 * (8 - len(units))


def test_widths_that_a_class_has_no_setting_for_are_refused_before_anything_slow(
    bench, tmp_path, nothing_slow
):
    """GPT-2 computes the width of a head from the hidden size and their number."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=67, n_positions=64, eos_token_id=2)
    randomized(GPT2LMHeadModel(config)).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    recipe = changed(
        bench, tmp_path / "gpt2", share=("remove: 0.2", "remove: 0.1\n  kinds: [attention_heads]")
    )
    with pytest.raises(ShrinkError, match="no setting of GPT2Config") as caught:
        pruned(recipe, tmp_path / "RUN")
    assert not isinstance(caught.value, RefusedWidthsError)
    assert "prune.layout" in caught.value.remedy


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ("keep_at_least: 0.5", BudgetError, r"70.0% of the parameters cannot be removed"),
        ("method: one_shot\n  keep_at_least: 0.5", BudgetError, r"70.0% of the parameters cannot be removed"),
        (
            "method: loraprune\n  keep_at_least: 0.5",
            BudgetError,
            r"70.0% of the parameters cannot be removed",
        ),
        ("method: blocks", BudgetError, r"70.0% of the parameters cannot be removed by whole blocks"),
        ("saliency: cosine", TrainingError, "the adapters in .* move none of its weights"),
        ("budget: kv_bytes\n  kinds: [ffn]", BudgetError, "no unit of ffn saves any kv_bytes"),
        ("kinds: [hidden]", TrainingError, "a norm counts the units"),
    ],
)
def test_what_cannot_be_done_is_found_by_a_rehearsal(bench, session, settings, error, message):
    remove = 0.5 if "hidden" in settings else 0.7
    recipe = changed(bench, method=prunes_by(settings), share=("remove: 0.2", f"remove: {remove}"))
    session.recipe = load_recipe(recipe)
    with pytest.raises(error, match=message):
        rehearse(session)


def test_heads_that_cannot_share_a_cache_are_told_before_anything_slow(
    bench, many_heads, tmp_path, nothing_slow
):
    shared = ("export: {", "export: {cache: shared, ")
    with pytest.raises(ExportError, match=r"heads of 4, and a shared cache wants a multiple of 8\n.*growing"):
        pruned(changed(bench, many_heads, shared=shared), tmp_path / "RUN")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_that_is_not_one_operator_cannot_share_its_cache(implementation):
    model = tiny_llama(attn_implementation=implementation)
    operators = gp.trace(model, {"input_ids": torch.arange(20).reshape(2, 10) + 3}).operators
    if implementation == "sdpa":
        check_attention(operators)
    else:
        with pytest.raises(ExportError, match="attention is not one operator"):
            check_attention(operators)


@pytest.mark.parametrize(
    ("method", "optimizer"), [("lhspg", "LHSPG"), ("loraprune", "LoRAPrune"), ("one_shot", "Gates")]
)
def test_a_rehearsal_tries_the_method_itself_and_leaves_nothing_on_the_model(
    bench, session, monkeypatch, method, optimizer
):
    session.recipe = load_recipe(changed(bench, method=prunes_by(f"method: {method}")))
    before = {name: tensor.clone() for name, tensor in session.adapted.state_dict().items()}
    rehearse(session)
    assert not any(module._forward_pre_hooks for module in session.adapted.modules())
    assert all(parameter.grad is None for parameter in session.adapted.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.adapted.state_dict().items())

    def refused(*arguments, **keywords):
        raise TrainingError("it cannot be done", "do something else")

    monkeypatch.setattr(f"graphprune.prune.methods.{method}.{optimizer}", refused)
    with pytest.raises(TrainingError, match="it cannot be done"):
        rehearse(session)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("distribution: {ratios: [0.5], windows: 99}", "asks for 99 windows beside"),
        ("repair: least_squares", "least_squares needs 2 windows"),
    ],
)
def test_text_that_is_too_short_is_found_before_the_model_is_opened(bench, tmp_path, settings, message):
    recipe = bench.with_recipe(
        method=prunes_by(settings),
        windows=("calibration_windows: 4\n  rank", "calibration_windows: 1\n  rank"),
    )
    with pytest.raises(RecipeError, match=message):
        pruned(recipe, tmp_path / "RUN")
    assert not (tmp_path / "RUN").exists()
