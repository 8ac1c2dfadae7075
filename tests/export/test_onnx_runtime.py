"""Generation with onnxruntime alone, against transformers' own; and the configuration for onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exported_models import Exported, windows

from graphprune.errors import ExportError
from graphprune.export.genai import write_genai_config
from graphprune.export.runtime import OnnxDecoder


def test_greedy_generation_is_that_of_transformers(dense: Exported) -> None:
    for prompt in windows(1, 7, 12):
        expected = dense.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert OnnxDecoder(dense.path).greedy(prompt, 10) == expected


def test_generation_ends_with_the_first_end_token(dense: Exported) -> None:
    decoder = OnnxDecoder(dense.path, threads=1)
    (prompt,) = windows(5)
    free = decoder.greedy(prompt, 8)
    end = free[3]
    assert decoder.greedy(prompt, 8, {end}) == free[: free.index(end) + 1]
    assert decoder.greedy(prompt, 0) == []


def test_positions_do_not_count_padding(learned_positions: Exported) -> None:
    decoder = OnnxDecoder(learned_positions.path)
    first, second = windows(9, 6)
    ids = np.array([first, [0] * 3 + second])
    mask = np.array([[1] * 9, [0] * 3 + [1] * 6])
    _, past = decoder.step(ids[:, :8], mask[:, :8])
    logits, _ = decoder.step(ids[:, 8:], mask, past)
    for row, text in enumerate((first, second)):
        alone = decoder.logits(np.array([text]))[0, -1]
        np.testing.assert_allclose(logits[row, 0], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_speed_is_tokens_a_second_of_wall_time(packed: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(np.arange(1000) * 0.25)
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    assert OnnxDecoder(packed.path).decode_speed([1, 2, 3], tokens=5) == pytest.approx(4.0)


def test_the_genai_configuration_names_what_the_file_has(packed: Exported, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(packed.path.read_bytes())
    path = write_genai_config(
        tmp_path,
        hidden_size=64,
        num_attention_heads=4,
        context_length=64,
        eos_token_ids=[2, 5],
        bos_token_id=1,
    )
    config = json.loads(path.read_text())
    decoder, model = config["model"]["decoder"], config["model"]
    graph = ir.load(packed.path).graph
    inputs = {value.name: value.shape for value in graph.inputs}
    names = decoder["inputs"]
    for layer in range(decoder["num_hidden_layers"]):
        for pattern in (names["past_key_names"], names["past_value_names"]):
            shape = inputs.pop(pattern % layer)
            assert shape is not None
            assert (shape[1], shape[3]) == (decoder["num_key_value_heads"], decoder["head_size"])
    assert {names[k] for k in ("input_ids", "attention_mask", "position_ids")} <= set(inputs)
    outputs = {value.name for value in graph.outputs}
    patterns = (decoder["outputs"]["present_key_names"], decoder["outputs"]["present_value_names"])
    present = {pattern % n for n in range(2) for pattern in patterns}
    assert outputs == {decoder["outputs"]["logits"]} | present
    assert (model["vocab_size"], model["eos_token_id"], model["bos_token_id"]) == (99, [2, 5], 1)
    assert model["pad_token_id"] == 2
    assert config["search"]["past_present_share_buffer"] is False


def test_a_genai_configuration_needs_an_end_token(packed: Exported) -> None:
    with pytest.raises(ExportError, match="0 end tokens"):
        write_genai_config(
            packed.path.parent, hidden_size=64, num_attention_heads=4, context_length=64, eos_token_ids=[]
        )
