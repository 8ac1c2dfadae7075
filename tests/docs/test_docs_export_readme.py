"""The code in the export's README runs as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_docs_readme import ROOT, snippets
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration


def test_a_classifier_is_written_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = snippets(ROOT / "graphprune" / "export" / "README.md")
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    config.intermediate_size = 64
    torch.manual_seed(0)
    ids = torch.randint(50, (2, 11))
    names = {"classifier": BertForSequenceClassification(config), "ids": ids, "mask": torch.ones_like(ids)}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert {file.name for file in (tmp_path / "classifier-onnx").iterdir()} == {
        "model.onnx",
        "model.onnx.data",
    }
    assert names["path"] == Path("classifier-onnx") / "model.onnx"


def test_a_translator_is_written_as_two_files_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code = snippets(ROOT / "graphprune" / "export" / "README.md")
    config = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50)
    torch.manual_seed(0)
    ids = torch.randint(50, (2, 11))
    names = {"translator": T5ForConditionalGeneration(config), "ids": ids, "mask": torch.ones_like(ids)}
    monkeypatch.chdir(tmp_path)
    exec(code, {**names, "texts": [[0, 5, 6, 7], [0, 8, 9]]})
    written = {f"{half}.onnx{data}" for half in ("encoder", "decoder") for data in ("", ".data")}
    assert {file.name for file in (tmp_path / "translator-onnx").iterdir()} == written
