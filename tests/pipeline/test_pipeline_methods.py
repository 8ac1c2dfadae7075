"""Each pruning method from the recipe, to a folder that stock transformers opens."""

from __future__ import annotations

import json

import pytest
import torch
from pruning_settings import prunes_by
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graphprune.errors import RecipeError, ShrinkError
from graphprune.files import write_text
from graphprune.pipeline.folder import open_run_folder
from graphprune.pipeline.inputs import open_inputs
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.run import run
from graphprune.pipeline.session import Session
from graphprune.pipeline.stages import prune_stage, trace_stage
from graphprune.recipe_file import load_recipe


def pruned(recipe, folder):
    """Run the stages up to pruning; return the rows of metrics and the session."""
    inputs = open_inputs(load_recipe(recipe), recipe.parent)
    with open_run_folder(folder, inputs.fingerprint, fresh=False) as opened:
        session = Session(inputs, opened, Reporter(None))
        trace_stage(session)
        (folder / "training").mkdir()
        prune_stage(session)
        rows = [json.loads(line) for line in (folder / "training" / "metrics.jsonl").read_text().splitlines()]
        return rows, session


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ("", 6),
        ("method: one_shot\n  saliency: magnitude", 0),
        ("method: one_shot\n  saliency: flap\n  repair: bias", 0),
        ("method: one_shot\n  saliency: wanda\n  repair: none", 0),
        ("method: loraprune\n  loraprune: {steps: 7, every: 2}", 7),
        ("method: loraprune\n  repair: bias\n  loraprune: {steps: 4, every: 1, importance: released}", 4),
        ("mode: paper", 6),
        ("mode: paper\n  saliency: magnitude\n  paper: {saliency: cosine, gamma: 0.5}", 6),
    ],
)
def test_each_method_prunes_what_was_asked(bench, tmp_path, settings, steps):
    recipe = bench.with_recipe(method=prunes_by(settings))
    folder = tmp_path / "RUN"
    rows, session = pruned(recipe, folder)
    assert [row["step"] for row in rows] == list(range(steps))
    plan = json.loads((folder / "plan.json").read_text())
    assert abs(plan["achieved"] - 0.2) < 0.08
    if rows:
        assert rows[-1]["zeroed"] == rows[-1]["target"] == sum(map(len, plan["removed"].values()))
    small = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert small.config.intermediate_size % 16 == 0
    assert session.folder.measured("pruning_steps") == steps
    assert session.folder.measured("surgery_error") < 1e-3


def test_a_run_that_removes_whole_blocks_ends_in_an_onnx_file(bench, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(bench.model)
    one, all_ = (sum(p.numel() for p in part.parameters()) for part in (dense.model.layers[0], dense))
    recipe = bench.with_recipe(
        method=prunes_by("method: blocks"), share=("remove: 0.2", f"remove: {one / all_:.3f}")
    )
    report = run(recipe, tmp_path / "RUN", Reporter(None))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "RUN" / "model")
    assert small.config.num_hidden_layers == dense.config.num_hidden_layers - 1
    assert report.parameters.after == all_ - one
    assert "whole blocks" in (tmp_path / "RUN" / "model" / "README.md").read_text()
    assert (tmp_path / "RUN" / "onnx" / "model.onnx").is_file()


def test_what_a_method_writes_to_the_weights_ends_with_its_stage(bench, tmp_path):
    """Paper mode zeroes rows of the base; later stages see the model as it came."""
    recipe = bench.with_recipe(method=prunes_by("mode: paper"))
    _, session = pruned(recipe, tmp_path / "RUN")
    first = AutoModelForCausalLM.from_pretrained(bench.model).state_dict()
    for name, tensor in session.dense.state_dict().items():
        assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize(
    ("kind", "switch", "layers", "filled"),
    [("ffn", "mlp_bias", 3, "down_proj"), ("attention_heads", "attention_bias", 4, "o_proj")],
)
def test_new_biases_are_where_the_stock_class_has_them_and_zero_elsewhere(
    bench, tmp_path, kind, switch, layers, filled
):
    recipe = bench.with_recipe(
        method=prunes_by(f"method: one_shot\n  repair: bias\n  kinds: [{kind}]"),
        share=("remove: 0.2", "remove: 0.15"),
    )
    pruned(recipe, tmp_path / "RUN")
    config = json.loads((tmp_path / "RUN" / "model" / "config.json").read_text())
    assert {name for name in ("mlp_bias", "attention_bias") if config[name]} == {switch}
    tensors = load_file(tmp_path / "RUN" / "model" / "model.safetensors")
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith(".bias")}
    assert len(biases) == 2 * layers
    for name, bias in biases.items():
        assert bool(bias.any()) == (filled in name), name


def test_biases_that_stock_classes_would_not_open_are_refused_before_any_work(bench, tmp_path, monkeypatch):
    from graphprune.pipeline import stages

    def forbidden(*_):
        raise AssertionError("the method ran")

    monkeypatch.setattr("graphprune.shrink.biases._switches", lambda config: [])
    monkeypatch.setattr(stages, "method_named", lambda name: forbidden)
    recipe = bench.with_recipe(method=prunes_by("repair: bias"))
    with pytest.raises(ShrinkError, match=r"LlamaForCausalLM has no place for model\.layers\.0.*proj\.bias"):
        pruned(recipe, tmp_path / "RUN")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "method: oneshot",
            r"prune\.method: there is no pruning method 'oneshot'\n.*did you mean 'one_shot'",
        ),
        ("mode: paper\n  repair: bias", r"prune\.repair is \"bias\": in paper mode the base changes"),
        ("mode: paper\n  method: one_shot", r"only prune\.method lhspg has a paper mode"),
        ("repair: true", r"prune\.repair is true: input should be 'none', 'bias' or 'least_squares'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(bench, settings, message):
    recipe = bench.with_recipe(method=prunes_by(settings))
    with pytest.raises(RecipeError, match=message):
        open_inputs(load_recipe(recipe), recipe.parent)


def test_a_multiple_for_a_kind_that_does_not_exist_is_refused(bench):
    recipe = bench.with_recipe(multiple=("{ffn: 16}", "{fnn: 16}"))
    with pytest.raises(RecipeError, match=r"prune\.width_multiple: there is no kind 'fnn'.*\n.*mean 'ffn'"):
        open_inputs(load_recipe(recipe), recipe.parent)


def test_paper_mode_turns_off_what_needs_gates(bench):
    recipe = bench.with_recipe(method=prunes_by("mode: paper"))
    settings = load_recipe(recipe).prune
    assert settings.repair == "none"
    assert settings.training.distill == 0
    write_text(recipe, recipe.read_text().replace("batch_size: 2,", "batch_size: 2, distill: 1.0,"))
    with pytest.raises(RecipeError, match="no un-pruned model is left"):
        load_recipe(recipe)
