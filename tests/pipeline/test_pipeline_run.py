"""The whole recipe on a tiny Llama, from a folder to a verified ONNX file and a report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import onnx
import pytest
import torch
from safetensors.numpy import load_file

from graphprune.errors import (
    GraphPruneError,
    RecipeError,
    RunFolderError,
    SourceError,
    TrainingError,
)
from graphprune.pipeline import run as module
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.run import STAGES, run
from graphprune.report.schema import read_report

SILENT = Reporter(None)


@pytest.fixture(scope="module")
def finished(bench, tmp_path_factory):
    """One whole run, shared by the tests of this file; do not change it."""
    folder = tmp_path_factory.mktemp("run") / "RUN"
    return folder, run(bench.recipe, folder, SILENT)


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_every_file_that_is_promised_is_there(finished):
    folder, _ = finished
    expected = """
        run.json recipe.input.yaml recipe.yaml environment.json log.txt plan.json report.html
        report.json graph/groups.json graph/groups.svg graph/groups.html graph/groups.graphml
        graph/widths.svg graph/certificate.json
        training/metrics.jsonl training/curves.svg model/config.json model/model.safetensors
        model/tokenizer.json model/graphprune.json model/README.md adapter/adapter_config.json
        adapter/adapter_model.safetensors adapter/graphprune.json quant/quant.safetensors
        quant/quant.json onnx/model.onnx onnx/model.onnx.data onnx/tokenizer.json
        onnx/genai_config.json
    """.split()
    assert [name for name in expected if not (folder / name).is_file()] == []
    leftovers = [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    assert leftovers == []
    assert not (folder / "onnx.unverified").exists()


def test_the_report_says_what_the_files_are(finished):
    folder, report = finished
    assert read_report(folder / "report.json") == report
    weights = load_file(folder / "model" / "model.safetensors")
    assert report.parameters.after == sum(tensor.size for tensor in weights.values())
    assert report.parameters.after < report.parameters.before
    assert abs(report.parameters.removed_share - 0.2) < 0.08
    assert report.bytes.onnx == sum(
        (folder / "onnx" / name).stat().st_size for name in ("model.onnx", "model.onnx.data")
    )
    plan = json.loads((folder / "plan.json").read_text())
    budget = report.budget
    assert (budget.unit, budget.asked_share, budget.removed_share) == ("parameters", 0.2, plan["achieved"])
    assert report.model.opened_by == "from_pretrained"
    assert report.certificate.ok
    assert report.certificate.permuted_max_error <= 1e-9
    assert report.certificate.removed_max_error <= 1e-9
    assert report.perplexity.onnx <= 1.05 * report.perplexity.recovered
    assert [stage.name for stage in report.stages] == list(STAGES)
    assert all(stage.seconds > 0 and stage.peak_bytes > 0 for stage in report.stages)


def test_the_plan_is_uniform_and_in_steps(finished):
    folder, report = finished
    widths = {(width.kind, width.before, width.after) for width in report.widths}
    assert all(after % 16 == 0 for kind, _, after in widths if kind == "ffn")
    assert len({kind for kind, _, _ in widths}) == len(widths)
    removed = json.loads((folder / "plan.json").read_text())["removed"]
    assert {width.name: width.before - width.after for width in report.widths} == {
        n: len(u) for n, u in removed.items()
    }


def test_stock_transformers_opens_the_pruned_model_in_a_process_of_its_own(finished):
    folder, report = finished
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]);"
        "print(sum(p.numel() for p in m.parameters())); assert 'graphprune' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "model")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.strip().splitlines()[-1]) == report.parameters.after


def test_the_onnx_file_alone_answers_prompts(finished, bench):
    """The example, which needs onnxruntime, numpy and tokenizers only, writes what our own decoder writes."""
    from transformers import AutoTokenizer

    from graphprune.export.runtime import OnnxDecoder

    folder, _ = finished
    onnx.checker.check_model(str(folder / "onnx" / "model.onnx"), full_check=True)
    example = Path(__file__).parents[2] / "examples" / "generate.py"
    command = [sys.executable, str(example), str(folder / "onnx"), "the cat sat on"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "onnx")
    ids = OnnxDecoder(folder / "onnx" / "model.onnx").greedy(tokenizer("the cat sat on")["input_ids"], 40)
    expected = "the cat sat on" + "".join(tokenizer.decode([i], skip_special_tokens=True) for i in ids)
    assert done.stdout.strip() == expected.strip()
    assert len(ids) == 40


def test_the_adapter_opens_in_peft_on_the_base_that_it_names(finished):
    """PEFT, on the de-quantized base, computes what the quantized model computes."""
    import hashlib

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from quant.linear import QuantLinear
    from quant.storage import load_quantized_

    folder, _ = finished
    named = json.loads((folder / "adapter" / "graphprune.json").read_text())["base"]
    assert named["sha256"] == hashlib.sha256((folder / named["file"]).read_bytes()).hexdigest()
    quantized = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    load_quantized_(quantized, folder / "quant")
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(quantized.get_input_embeddings().quantized.dequantize())
        for name, module in quantized.named_modules():
            if isinstance(module, QuantLinear) and module.lora_A is not None:
                base.get_submodule(name).weight.copy_(module.quantized.dequantize())
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        ids = torch.arange(10)[None] + 4
        torch.testing.assert_close(
            adapted(input_ids=ids).logits, quantized(input_ids=ids).logits, atol=1e-5, rtol=1e-4
        )


def test_layers_are_quantized_as_the_recipe_says(finished, bench):
    """Its section as arguments of `loftq_model`, on the pruned model and the windows that the seed draws."""
    from transformers import AutoModelForCausalLM

    from graphprune.pipeline.inputs import open_inputs
    from graphprune.recipe_file import load_recipe
    from quant import LoftQConfig, QuantLinear, loftq_model
    from quant.storage import load_quantized_

    folder, _ = finished
    found, expected = (AutoModelForCausalLM.from_pretrained(folder / "model").eval() for _ in range(2))
    load_quantized_(found, folder / "quant")
    train = open_inputs(load_recipe(bench.recipe), bench.recipe.parent).train
    config = LoftQConfig(
        rank=4, block_size=16, iterations=2, scale_storage="double", seed=3, embedding_format="int8"
    )
    text = [{"input_ids": ids, "labels": ids} for ids in train.drawn(4, 3).split(4)]
    loftq_model(expected, config, text, loss=lambda output: output.loss)
    layers = [name for name, module in expected.named_modules() if isinstance(module, QuantLinear)]
    assert len(layers) > 7
    for name in layers:
        ours, theirs = found.get_submodule(name).quantized, expected.get_submodule(name).quantized
        assert ours.scales.storage == theirs.scales.storage
        assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_a_second_run_reuses_every_stage(finished, bench, monkeypatch):
    folder, first = finished
    before = content(folder / "onnx")

    def forbidden(session):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(module, "STAGES", dict.fromkeys(STAGES, forbidden))
    second = run(bench.recipe, folder, SILENT)
    assert all(stage.state == "reused" for stage in second.stages)
    assert [stage.name for stage in second.stages] == list(STAGES)
    assert second.perplexity == first.perplexity
    assert content(folder / "onnx") == before


@pytest.fixture(scope="module")
def killed(bench, tmp_path_factory):
    """One run that is killed before each stage and goes on; do not change it.

    Returns:
        A copy of the folder as each stage found it, by the stage's name, and the report of the end.
    """

    class Killed(BaseException):
        pass

    def die(session):
        raise Killed

    base = tmp_path_factory.mktemp("killed")
    for name in STAGES:
        with mock.patch.object(module, "STAGES", {**STAGES, name: die}), pytest.raises(Killed):
            run(bench.recipe, base / "RUN", SILENT)
        shutil.copytree(base / "RUN", base / name)
    return {name: base / name for name in STAGES}, run(bench.recipe, base / "RUN", SILENT)


def test_a_run_that_was_killed_before_each_stage_ends_as_an_undisturbed_one(finished, killed):
    """All that was done stays; the last call does the last stage alone."""
    folders, resumed = killed
    names = list(STAGES)
    for position, name in enumerate(names):
        assert set(json.loads((folders[name] / "run.json").read_text())["stages"]) == set(names[:position])
    _, undisturbed = finished
    assert resumed.widths == undisturbed.widths
    assert resumed.perplexity.onnx == pytest.approx(undisturbed.perplexity.onnx, rel=1e-5)
    assert [stage.name for stage in resumed.stages if stage.state == "reused"] == names[:-1]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_does_nothing_is_noticed(bench, killed, tmp_path, monkeypatch, name):
    """Each stage's result is needed by a later one or by the report."""
    folders, _ = killed
    shutil.copytree(folders[name], tmp_path / "RUN")
    monkeypatch.setattr(module, "STAGES", {**STAGES, name: lambda session: "skipped"})
    with pytest.raises((GraphPruneError, OSError, KeyError, ValueError)):
        run(bench.recipe, tmp_path / "RUN", SILENT)
    assert not (tmp_path / "RUN" / "report.json").exists()


def test_a_run_whose_process_was_killed_goes_on_and_leaves_no_rubbish(bench, tmp_path):
    """SIGKILL as soon as pruning is done; half-written files of that process are swept."""
    folder = tmp_path / "RUN"
    command = [sys.executable, "-m", "graphprune", "run", str(bench.recipe), "-o", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("prune"):
                process.kill()
                break
        else:
            pytest.fail("the run never pruned")
    (folder / ".4242.quant").mkdir()
    (folder / ".4242.quant" / "half").write_text("written")
    (folder / "training" / ".4242.metrics.jsonl").write_text("half")
    report = run(bench.recipe, folder, SILENT)
    assert {stage.name for stage in report.stages if stage.state == "reused"} >= {
        "evaluate",
        "trace",
        "certify",
    }
    hidden = [path.name for path in folder.rglob(".*")]
    assert hidden == [".lock"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("id: tiny", "id: ./none"), SourceError, "there is no model './none'"),
        (("remove: 0.2", "remove: 1.2"), RecipeError, "prune.remove is 1.2"),
        (("rank: 4\n  alpha", "rnak: 4\n  alpha"), RecipeError, "did you mean 'rank'"),
        (("evaluate: evaluate.txt", "evaluate: train.txt"), RecipeError, "share documents"),
        (("evaluate_window: 32", "evaluate_window: 4000"), SourceError, "too short"),
        (("format: nf4", "format: nf5"), RecipeError, "quantize.format"),
        (("block_size: 16", "block_size: 8"), RecipeError, "quantize.block_size: a block of 8 weights"),
        (("settle_steps: 1", "settle_steps: 1\n  saliency: magic"), RecipeError, "no saliency 'magic'"),
        (("settle_steps: 1", "settle_steps: 1\n  kinds: [fnn]"), RecipeError, "did you mean 'ffn'"),
        (("seed: 3", "seed: 4"), RunFolderError, "another recipe"),
    ],
)
def test_bad_input_leaves_a_finished_run_as_it_was(finished, bench, change, error, message):
    folder, _ = finished
    before = content(folder)
    with pytest.raises(error, match=message) as caught:
        run(bench.with_recipe(change=change), folder, SILENT)
    assert "→" in str(caught.value)
    assert content(folder) == before


def test_a_folder_of_somebody_else_is_not_touched(bench, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="not a graphprune run"):
        run(bench.recipe, tmp_path, SILENT, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_files_that_are_gone_are_made_again(finished, bench, tmp_path):
    folder, first = finished
    copy = tmp_path / "RUN"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "onnx")
    second = run(bench.recipe, copy, SILENT)
    assert {stage.name for stage in second.stages if stage.state == "done"} == {"export", "speed"}
    assert second.perplexity.onnx == pytest.approx(first.perplexity.onnx, rel=1e-5)
    assert (copy / "onnx" / "model.onnx").is_file()


def test_speed_is_measured_where_it_is_asked_for(finished, bench, tmp_path):
    folder, first = finished
    copy = tmp_path / "RUN"
    shutil.copytree(folder, copy)
    assert first.tokens_per_second is None
    asked = run(bench.with_recipe(change=("speed_tokens: 0", "speed_tokens: 4")), copy, SILENT)
    assert {stage.name for stage in asked.stages if stage.state == "done"} == {"evaluate", "speed"}
    assert asked.tokens_per_second.new_tokens == 4
    assert asked.tokens_per_second.dense_onnx_fp32 > 0
    assert asked.tokens_per_second.compact_onnx > 0
    assert "Tokens per second" in (copy / "report.html").read_text()
    assert not (copy / "dense-onnx").exists()
    no_more = run(bench.recipe, copy, SILENT)
    assert no_more.tokens_per_second is None
    assert "Tokens per second" not in (copy / "report.html").read_text()


def test_a_manifest_that_is_broken_can_be_discarded(bench, tmp_path):
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(RunFolderError, match="--fresh"):
        run(bench.recipe, tmp_path, SILENT)
    assert (tmp_path / "run.json").read_text() == "{half"


def test_an_output_below_a_file_is_refused(bench, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot be made"):
        run(bench.recipe, tmp_path / "file" / "RUN", SILENT)


def test_a_folder_that_another_process_holds_is_refused(finished, bench):
    from filelock import FileLock

    folder, _ = finished
    before = content(folder)
    with (
        FileLock(folder / ".lock"),
        pytest.raises(RunFolderError, match="in use by another running graphprune"),
    ):
        run(bench.recipe, folder, SILENT)
    assert content(folder) == before


def test_layers_of_different_widths_come_through_to_the_end(bench, tmp_path):
    """Heads and channels both, by another process that opens the float model, and by the verified ONNX file."""
    distribution = "distribution: {ratios: [0.25, 0.5], windows: 2, unprunable: 0.25}"
    recipe = bench.with_recipe(
        remove=("  remove: 0.2", f"  remove: 0.11\n  layout: per_layer\n  {distribution}"),
        multiple=("{ffn: 16}", "{ffn: 8}"),
        base=("recover: {", "recover: {base: pruned, rank: 4, "),
    )
    folder = tmp_path / "RUN"
    report = run(recipe, folder, SILENT)
    assert sorted(width.kind for width in report.widths) == ["attention_heads"] * 2 + ["ffn"] * 2
    narrower = [width.kind for width in report.widths if width.after < width.before]
    assert sorted(narrower) == ["attention_heads", "ffn"]  # of one layer each
    weights = load_file(folder / "model" / "model.safetensors")
    assert report.parameters.after == sum(tensor.size for tensor in weights.values())
    code = (
        "import sys, graphprune as gp; m = gp.load(sys.argv[1]);"
        "print(sum(p.numel() for p in m.parameters()), type(m).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "model")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == [str(report.parameters.after), "LlamaForCausalLM"]
    assert report.model.opened_by == "graphprune.load"
    measured = json.loads((folder / "graph" / "distribution.json").read_text())["groups"]
    assert {name.rpartition(":")[2] for name in measured} == {"ffn", "attention_heads"}
    assert (folder / "graph" / "distribution.svg").read_text().startswith("<svg")
    assert 'id="distribution' in (folder / "report.html").read_text()
    notes = {stage.name: stage.note for stage in report.stages}
    assert "opened by graphprune.load, for layers differ in width" in notes["reload"]
    for name in ("model", "recovered"):
        assert f'gp.load("{name}")' in (folder / name / "README.md").read_text()
    cache = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph.input
    heads = {i.name: i.type.tensor_type.shape.dim[1].dim_value for i in cache if i.name.endswith(".key")}
    assert sorted(heads.values()) == [1, 2]
    assert report.perplexity.onnx <= 1.05 * report.perplexity.recovered
    assert any("graphprune.load" in limit for limit in report.limits)


def test_a_budget_that_is_not_there_is_named_before_anything_is_opened(bench, tmp_path):
    recipe = bench.with_recipe(budget=("  remove: 0.2", "  remove: 0.2\n  budget: flops"))
    with pytest.raises(RecipeError, match=r"prune\.budget: there is no cost 'flops'"):
        run(recipe, tmp_path / "RUN", SILENT)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_one_of_several_processes_is_told_what_works_and_touches_nothing(bench, tmp_path, monkeypatch, name):
    """As torchrun, ``accelerate launch`` or mpirun start it; the first process is none the better."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(name, "2")
    with pytest.raises(TrainingError, match=r"one process, and this is one of 2[^→]*\n.*without accelerate"):
        run(bench.recipe, tmp_path / "RUN", SILENT)
    assert not (tmp_path / "RUN").exists()
    monkeypatch.setenv(name, "1")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        run(tmp_path / "none.yaml", tmp_path / "RUN", SILENT)
