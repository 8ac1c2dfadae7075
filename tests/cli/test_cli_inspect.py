"""``graphprune inspect``: what it prints and writes, without weights, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_llama
from torch import nn
from typer.testing import CliRunner

from graphprune.cli import app
from graphprune.coupling.groups import node_groups
from graphprune.errors import NothingPrunableError, SourceError, VerificationError
from graphprune.pipeline import inspect as module
from graphprune.pipeline.inspect import Inspection, inspect
from graphprune.report.group_document import group_document
from graphprune.report.group_files import GROUP_FILES
from graphprune.source.model import example_inputs
from graphprune.trace.model import trace

FILES = set(GROUP_FILES)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with weights."""
    path: Path = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(path)
    return path


@pytest.fixture
def config_only(model: Any, tmp_path: Path) -> Path:
    path = tmp_path / "config-only"
    model.config.save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    return path


def test_the_command_prints_the_table_and_writes_the_files(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = CliRunner().invoke(app, ["inspect", str(folder), "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in output.iterdir()} == FILES
    ffn = next(line.split() for line in done.output.splitlines() if line.split()[:1] == ["ffn"])
    assert ffn == ["ffn", "mlp", "×", "2", "48", "96", "yes"]
    assert "a lookup reads its rows by number" in done.output
    assert "groups.html" in done.output


@pytest.mark.parametrize("given", ["folder", "config folder", "config file"])
def test_groups_without_weights_are_those_with_weights(
    given: str, folder: Path, config_only: Path, model: Any, tmp_path: Path
) -> None:
    path = {"folder": folder, "config folder": config_only, "config file": config_only / "config.json"}[given]
    found = inspect(str(path), tmp_path / "out")
    expected = group_document(node_groups(trace(model, example_inputs(model), dynamic=False)), path.name)
    assert found.document["groups"] == expected["groups"]
    assert found.document["parameters"] == expected["parameters"]
    assert json.loads((tmp_path / "out" / "groups.json").read_text(encoding="utf-8")) == found.document


def test_no_weight_is_ever_allocated(
    config_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = json.loads((config_only / "config.json").read_text())
    # 32 TB of weights: nobody has the memory for them
    settings |= {"hidden_size": 524_288, "intermediate_size": 2_097_152, "num_attention_heads": 4096}
    settings |= {"num_key_value_heads": 1024, "head_dim": 128}
    (config_only / "config.json").write_text(json.dumps(settings))
    devices = set()

    def watched(traced: nn.Module, inputs: Any, **options: Any) -> Any:
        devices.update(parameter.device.type for parameter in traced.parameters())
        return trace(traced, inputs, **options)

    monkeypatch.setattr(module, "trace", watched)
    found = inspect(str(config_only), tmp_path / "out")
    assert devices == {"meta"}
    assert found.document["elements"]["total"] > 7e12
    ffn = next(row for row in found.document["groups"] if row["kind"] == "ffn")
    assert (ffn["size"], ffn["parameters_per_unit"]) == (2_097_152, 3 * 524_288)


def test_a_certificate_is_written_and_told(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(folder), "-o", str(tmp_path / "out"), "--certify"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "certificate.json"}
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["ok"]
    assert f"renumbering {certificate['groups']} groups" in " ".join(done.output.split())


def test_a_certificate_that_fails_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.certify
    monkeypatch.setattr(module, "certify", lambda *given: real(*given, tolerance=1e-300))
    with pytest.raises(VerificationError, match="node groups are wrong"):
        inspect(str(folder), tmp_path / "out", certified=True)
    assert not json.loads((tmp_path / "out" / "certificate.json").read_text())["ok"]


def test_nothing_prunable_is_an_error_with_the_reasons_after_the_files(
    config_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(nn.Module):
        """Both axes of its one weight reach the outside."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    monkeypatch.setattr(module, "_without_weights", lambda *given: ("closed", Closed().eval()))
    monkeypatch.setattr(module, "example_inputs", lambda model: {"x": torch.ones(3, 6)})
    done = CliRunner().invoke(app, ["inspect", str(config_only), "-o", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    error = done.exception
    assert isinstance(error, NothingPrunableError)
    assert error.exit_code == 3
    assert "none of the 2 node groups may lose units" in str(error)
    assert "reaches the model's input 'x' axis 1" in str(error)
    assert "reaches the model's output 'linear' axis 1" in str(error)
    assert "no (1)" in done.output


def test_a_model_without_groups_is_an_error_too() -> None:
    document = {"model": "empty", "groups": []}
    with pytest.raises(NothingPrunableError, match="none of the 0 node groups"):
        Inspection(document, None).raise_if_nothing_is_prunable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no model"),
        ({}, "has no config.json"),
        ({"config.json": "{ not json"}, "cannot open"),
        ({"config.json": '{"model_type": "nobody-knows-it"}'}, "cannot open"),
        ({"config.json": '{"model_type": "t5"}'}, "no model can be built"),
    ],
)
def test_a_bad_model_is_one_message(content: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        inspect(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["none.onnx", "none.json"])
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no file"):
        inspect(str(tmp_path / name), tmp_path / "out")


def test_weights_are_needed_for_a_certificate(config_only: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no safetensors weights"):
        inspect(str(config_only), tmp_path / "out", certified=True)


def test_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("graphprune.trace.onnx")
    path = tmp_path / "net.onnx"
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).eval()
    torch.onnx.export(net, (torch.ones(3, 6),), path, dynamo=True, verbose=False)
    found = inspect(str(path), tmp_path / "out")
    assert [row["size"] for row in found.document["groups"] if row["prunable"]] == [10]
    assert found.certificate is None
    certificate = inspect(str(path), tmp_path / "out", certified=True).certificate
    assert certificate is not None
    assert certificate.ok
    assert certificate.removed_effect > 1e-3
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["pruned_groups"] == 1


def test_the_exit_code_and_the_message_of_a_whole_process(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "graphprune",
        "inspect",
        "nothing/here/at-all",
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == SourceError.exit_code
    assert "error: there is no model 'nothing/here/at-all'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("BertForMaskedLM", {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}),
        ("T5ForConditionalGeneration", {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4}),
        ("ViTForImageClassification", {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}),
    ],
)
def test_models_that_are_no_causal_language_models(
    name: str, settings: dict[str, int], tmp_path: Path
) -> None:
    depth = {"num_layers": 2, "num_hidden_layers": 2, "vocab_size": 61, "image_size": 20, "patch_size": 5}
    kind = getattr(transformers, name)
    config = kind.config_class(**settings, **depth, architectures=[name])
    config.save_pretrained(tmp_path / "model")
    found = inspect(str(tmp_path / "model"), tmp_path / "out")
    assert {row["kind"] for row in found.document["groups"] if row["prunable"]} == {
        "attention_heads",
        "head_dim",
        "ffn",
    }
