"""The whole run on the ONNX file of a decoder with its cache."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx_runs import SILENT, changed, printed
from torch import nn
from transformers import AutoTokenizer

from graphprune.errors import (
    BudgetError,
    QuantizationError,
    RecipeError,
    RunFolderError,
    SourceError,
    TraceError,
    VerificationError,
)
from graphprune.export.check import raise_if_failed
from graphprune.pipeline import run as module
from graphprune.pipeline.exported import find_exported
from graphprune.pipeline.onnx_genai import write_companions
from graphprune.pipeline.onnx_inputs import open_onnx_inputs
from graphprune.pipeline.run import run, run_until
from graphprune.pipeline.verify_run import verify
from graphprune.recipe_file import load_recipe
from graphprune.report.schema import read_report

STAGES = ["trace", "certify", "evaluate", "prune", "export", "speed"]


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def finished(door, tmp_path_factory):
    """One whole run, in which no torch module may be built; do not change it."""
    folder = tmp_path_factory.mktemp("run") / "RUN"
    before = content(door)

    def forbidden(*arguments, **keywords):
        raise AssertionError("a torch module was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__init__", forbidden)
        report = run(door / "recipe.yaml", folder, SILENT)
    assert content(door) == before
    return folder, report


def numbers(file: Path) -> int:
    """Parameters of an ONNX file: what its float weights hold."""
    model = onnx.load(file)
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    return sum(array.size for name, array in arrays.items() if array.dtype == np.float32 and "weight" in name)


def perplexity_of(file: Path, texts: list[list[int]]) -> float:
    """By onnxruntime and numpy alone, each text whole from an empty cache."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    total, count = 0.0, 0
    for text in texts:
        ids = np.array([text])
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.size)[None],
        }
        for value in session.get_inputs()[3:]:
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        logits = session.run(["logits"], feeds)[0][0].astype(np.float64)
        likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= likelihood[np.arange(len(text) - 1), text[1:]].sum()
        count += len(text) - 1
    return math.exp(total / count)


def test_every_file_that_is_promised_is_there(finished):
    folder, report = finished
    expected = """
        run.json recipe.input.yaml recipe.yaml environment.json log.txt plan.json report.html report.json
        graph/groups.json graph/groups.html graph/widths.svg graph/certificate.json
        model/model.onnx model/model.onnx.data onnx/model.onnx onnx/model.onnx.data onnx/tokenizer.json
        onnx/genai_config.json
    """.split()
    assert [name for name in expected if not (folder / name).is_file()] == []
    assert [path.name for path in folder.rglob(".*")] == [".lock"]
    assert not any((folder / name).exists() for name in ("onnx.unverified", "reference"))
    assert read_report(folder / "report.json") == report
    assert [stage.name for stage in report.stages] == STAGES


def test_the_report_says_what_the_files_are(finished, door):
    folder, report = finished
    assert report.parameters.before == numbers(door / "decoder" / "model.onnx")
    assert report.parameters.after == numbers(folder / "model" / "model.onnx")
    assert 0.1 < report.parameters.removed_share < 0.3
    removed = json.loads((folder / "plan.json").read_text())["removed"]
    lost = {width.name: width.before - width.after for width in report.widths if width.before > width.after}
    assert lost == {name: len(units) for name, units in removed.items()}
    assert all(width.after % 16 == 0 for width in report.widths if width.kind == "ffn")
    assert report.bytes.onnx == sum(
        (folder / "onnx" / name).stat().st_size for name in ("model.onnx", "model.onnx.data")
    )
    assert report.bytes.pruned < report.bytes.source
    assert len(report.layers_quantized) == 15
    assert {layer.format for layer in report.layers_quantized} == {"nf4", "int8"}
    assert report.certificate.ok
    assert report.distance is None
    assert "ONNX and its float model, same next token" in printed(report)
    page = (folder / "report.html").read_text()
    assert "With LoftQ" not in page
    assert "torch" not in page.split("<h2>How to do it again")[0].replace("onnxruntime", "")


def test_perplexities_are_those_of_the_files(finished, door):
    folder, report = finished
    inputs = open_onnx_inputs(load_recipe(door / "recipe.yaml"), door)
    texts = inputs.evaluate.ids.tolist()
    assert report.perplexity.dense == pytest.approx(
        perplexity_of(door / "decoder" / "model.onnx", texts), rel=1e-4
    )
    assert report.perplexity.pruned == pytest.approx(
        perplexity_of(folder / "model" / "model.onnx", texts), rel=1e-4
    )
    assert report.perplexity.onnx == pytest.approx(
        perplexity_of(folder / "onnx" / "model.onnx", texts), rel=1e-4
    )
    assert report.perplexity.onnx <= 1.05 * report.perplexity.quantized
    assert report.perplexity.recovered is None


def test_what_stands_beside_the_file_is_told_of_its_heads(finished):
    folder, _ = finished
    decoder = json.loads((folder / "onnx" / "genai_config.json").read_text())["model"]["decoder"]
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
    heads = max(v.type.tensor_type.shape.dim[1].dim_value for v in graph.input if v.name.endswith(".key"))
    assert (decoder["num_key_value_heads"], decoder["num_attention_heads"]) == (heads, 2 * heads)
    assert decoder["filename"] == "model.onnx"
    tokenizer = AutoTokenizer.from_pretrained(folder / "onnx")
    assert tokenizer("the cat")["input_ids"]
    metadata = {entry.key: entry.value for entry in onnx.load(folder / "onnx" / "model.onnx").metadata_props}
    assert (
        json.loads(metadata["graphprune.plan"]) == json.loads((folder / "plan.json").read_text())["removed"]
    )


def test_fewer_key_heads_take_their_queries_along(door, tmp_path):
    """A configuration of twice the heads that the file has."""
    target = tmp_path / "onnx"
    shutil.copytree(door / "decoder", target)
    config = json.loads((door / "decoder" / "genai_config.json").read_text())
    config["model"]["decoder"] |= {
        "num_key_value_heads": 4,
        "num_attention_heads": 8,
        "filename": "other.onnx",
    }
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    write_companions(tmp_path, target, None)
    assert json.loads((target / "genai_config.json").read_text()) == json.loads(
        (door / "decoder" / "genai_config.json").read_text()
    )
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(SourceError, match="no configuration of a decoder"):
        write_companions(tmp_path, target, None)


def test_a_second_run_reuses_every_stage(finished, door, monkeypatch):
    folder, first = finished
    before = content(folder / "onnx")

    def forbidden(session):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(module, "ONNX_STAGES", dict.fromkeys(STAGES, forbidden))
    second = run(door / "recipe.yaml", folder, SILENT)
    assert all(stage.state == "reused" for stage in second.stages)
    assert second.perplexity == first.perplexity
    assert content(folder / "onnx") == before


def test_a_run_that_was_killed_goes_on_and_ends_the_same(finished, door, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(session):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "ONNX_STAGES", {**module.ONNX_STAGES, "export": die})
        with pytest.raises(Killed):
            run(door / "recipe.yaml", tmp_path / "RUN", SILENT)
    resumed = run(door / "recipe.yaml", tmp_path / "RUN", SILENT)
    folder, undisturbed = finished
    assert [stage.name for stage in resumed.stages if stage.state == "reused"] == STAGES[:4]
    assert resumed.perplexity == undisturbed.perplexity
    assert content(tmp_path / "RUN" / "onnx") == content(folder / "onnx")


def test_a_process_that_was_killed_leaves_no_rubbish(door, tmp_path):
    """SIGKILL of the command line as soon as the groups are certified."""
    folder = tmp_path / "RUN"
    command = [sys.executable, "-m", "graphprune", "run", str(door / "recipe.yaml"), "-o", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("certify"):
                process.kill()
                break
        else:
            pytest.fail("the run never certified")
    (folder / ".4242.reference").mkdir()
    report = run(door / "recipe.yaml", folder, SILENT)
    assert {stage.name for stage in report.stages if stage.state == "reused"} >= {"trace", "certify"}
    assert [path.name for path in folder.rglob(".*")] == [".lock"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (("quantize: {", "quantize: {format: int4, exclude: [embed], "), {"export", "speed"}),
        (("report: {", "export: {profile: portable}\nreport: {"), {"export", "speed"}),
        (("new_tokens: 5", "new_tokens: 6"), {"evaluate", "speed"}),
    ],
)
def test_a_changed_section_does_again_what_read_it(finished, door, tmp_path, change, again):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "RUN")
    report = run(changed(door, change), tmp_path / "RUN", SILENT)
    assert {stage.name for stage in report.stages if stage.state == "done"} == again
    if change[0] == "quantize: {":
        assert {layer.format for layer in report.layers_quantized} == {"int4"}
        assert any("it was excluded" in limit for limit in report.limits)
    if "portable" in change[1]:
        found, source = (
            {(node.domain, node.op_type) for node in onnx.load(path / "model.onnx").graph.node}
            for path in (tmp_path / "RUN" / "onnx", door / "decoder")
        )
        assert {domain for domain, _ in found - source} <= {"", "ai.onnx"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            ("remove: 0.2", "remove: 0.2, method: lhspg"),
            RecipeError,
            r"method is lhspg.*one shot[^→]*\n.*method: one_shot",
        ),
        (
            ("remove: 0.2", "remove: 0.2, rank: 4, alpha: 2"),
            RecipeError,
            r"nothing reads prune\.alpha, prune\.rank\n",
        ),
        (
            ("quantize: {", "quantize: {rank: 4, "),
            RecipeError,
            r"nothing reads quantize\.rank\n.*quantized plainly",
        ),
        (("seed: 3", "recover: {steps: 9}"), RecipeError, r"nothing reads recover\.steps"),
        (("seed: 3", "export: {adapters: merged}"), RecipeError, r"nothing reads export\.adapters"),
        (("remove: 0.2", "remove: 0.2, saliency: fisher"), RecipeError, "no saliency of ONNX files 'fisher'"),
        (("remove: 0.2", "remove: 0.2, repair: bias"), RecipeError, "repair is bias"),
        (("block_size: 16", "format: nf5"), RecipeError, r"quantize\.format: there is no format 'nf5'"),
        (("remove: 0.2", "remove: 0.2, kinds: [fnn]"), RecipeError, "did you mean 'ffn'"),
        (("evaluate: evaluate.txt", "evaluate: train.txt"), RecipeError, "share documents"),
        (("train: train.txt, ", ""), RecipeError, r"predicts text, and it takes two[^→]*\n.*--train FILE"),
        (("decoder/model.onnx", "decoder/none.onnx"), SourceError, "there is no model"),
        (("evaluate_window: 32", "evaluate_window: 4000"), SourceError, "too short"),
        (("evaluate_windows: 4", "evaluate_windows: 4, inputs: x.npz"), RecipeError, "reads data.inputs"),
        (("seed: 3", "seed: 4"), RunFolderError, "another recipe"),
    ],
)
def test_bad_input_is_told_before_a_finished_run_is_touched(finished, door, tmp_path, change, error, message):
    folder, _ = finished
    before = content(folder)
    with pytest.raises(error, match=message) as caught:
        run(changed(door, change), folder, SILENT)
    assert "→" in str(caught.value)
    assert content(folder) == before


def test_what_cannot_be_reached_is_told_right_after_tracing(door, tmp_path):
    with pytest.raises(BudgetError):
        run(changed(door, ("remove: 0.2", "remove: 0.95")), tmp_path / "RUN", SILENT)
    assert json.loads((tmp_path / "RUN" / "run.json").read_text())["stages"] == {}
    with pytest.raises(QuantizationError, match=r"none of 15 weights can be packed: it was excluded"):
        run(changed(door, ("block_size: 16", "exclude: ['.']")), tmp_path / "OTHER", SILENT)


def test_stages_of_transformers_models_are_none_of_an_onnx_file(door, tmp_path):
    with pytest.raises(RecipeError, match=r"no stage 'reload' for an ONNX file[^→]*\n.*graphprune run"):
        run_until("reload", door / "recipe.yaml", tmp_path / "RUN", SILENT)
    assert not (tmp_path / "RUN").exists()


def test_a_file_is_verified_again_and_a_changed_one_is_found_out(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "RUN")
    exported = find_exported(tmp_path / "RUN")
    checks = verify(exported)
    raise_if_failed("the file", checks)
    assert {check.name for check in checks} >= {"weights", "outputs", "not_finite"}
    assert next(check for check in checks if check.name == "weight_rounding").measured > 1e-3  # NF4 on 8 bits
    model = onnx.load(exported.file)
    codes = next(item for item in model.graph.initializer if item.name.endswith("codes"))
    turned = numpy_helper.to_array(codes).copy()
    turned[0] ^= 0x70
    codes.CopyFrom(numpy_helper.from_array(turned, codes.name))
    onnx.save(model, exported.file)
    broken = {check.name for check in verify(exported) if check.holds is False}
    assert "weights" in broken


def test_a_file_that_does_not_compute_the_same_never_gets_its_name(door, tmp_path, monkeypatch):
    """Weights as they should be, but one operator more between them."""
    from graphprune.pipeline import onnx_stages

    def doubling(*arguments, **keywords):
        quantized = quantize(*arguments, **keywords)
        output = quantized.model.graph.outputs[0]
        node = ir.node("Add", [output, output])
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "twice", output.type, output.shape
        quantized.model.graph.append(node)
        output.name, node.outputs[0].name = "once", output.name
        quantized.model.graph.outputs[0] = node.outputs[0]
        return quantized

    quantize = onnx_stages.quantize_onnx
    monkeypatch.setattr(onnx_stages, "quantize_onnx", doubling)
    with pytest.raises(VerificationError, match="outputs"):
        run(door / "recipe.yaml", tmp_path / "RUN", SILENT)
    assert (tmp_path / "RUN" / "onnx.unverified" / "model.onnx").is_file()
    assert not (tmp_path / "RUN" / "onnx").exists()


def test_a_tokenizer_is_looked_for_beside_the_file_or_where_the_recipe_says(door, tmp_path):
    shutil.copytree(door / "decoder", tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.rename(tmp_path / path.name)
    given = changed(door, ("model: decoder/model.onnx", f"model: {tmp_path / 'bare' / 'model.onnx'}"))
    with pytest.raises(SourceError, match=r"no tokenizer: there is no .*tokenizer\.json\n.*model\.tokenizer"):
        open_onnx_inputs(load_recipe(given), door)
    (tmp_path / "tokenizer_config.json").unlink()
    place = f"model: {{id: {tmp_path / 'bare' / 'model.onnx'}, tokenizer: {tmp_path / 'tokenizer.json'}}}"
    given = changed(door, ("model: decoder/model.onnx", place))
    alone = open_onnx_inputs(load_recipe(given), door)
    assert (
        alone.tokenizer("the cat")["input_ids"]
        == AutoTokenizer.from_pretrained(door / "decoder")("the cat")["input_ids"]
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="is not a tokenizer"):
        open_onnx_inputs(load_recipe(given), door)


def test_without_a_recipe_there_must_be_an_onnx_file_with_its_data(door, tmp_path):
    with pytest.raises(RecipeError, match=r"without a recipe only a \.onnx file"):
        run(None, tmp_path / "RUN", SILENT, model="demo")
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(TraceError, match="not an ONNX model"):
        run(None, tmp_path / "RUN", SILENT, model=str(tmp_path / "model.onnx"))
    for name in ("model.onnx", "tokenizer.json"):
        shutil.copy(door / "decoder" / name, tmp_path)
    with pytest.raises(
        SourceError, match=r"the weights of .* lie in .*model\.onnx\.data, which is not there"
    ):
        run(
            None,
            tmp_path / "RUN",
            SILENT,
            model=str(tmp_path / "model.onnx"),
            train=str(door / "train.txt"),
            evaluate=str(door / "evaluate.txt"),
        )
    assert not (tmp_path / "RUN").exists()
