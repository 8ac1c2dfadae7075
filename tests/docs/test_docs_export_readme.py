"""The code in the export's README runs as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_docs_readme import ROOT, snippets
from transformers import BertConfig, BertForSequenceClassification


def test_a_classifier_is_written_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = snippets(ROOT / "graphprune" / "export" / "README.md")
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
