"""The whole run on ONNX files of encoders, convolutional nets and decoders without a cache."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_exports import EXPORTS, exported
from onnx_runs import SILENT, distance, printed
from torch import nn

from graphprune.errors import RecipeError, SourceError
from graphprune.pipeline.onnx_inputs import open_onnx_inputs
from graphprune.pipeline.onnx_session import OnnxRun
from graphprune.pipeline.run import run
from graphprune.recipe import Prune
from graphprune.recipe_file import load_recipe


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """An encoder and a convolutional net as files."""
    folder = tmp_path_factory.mktemp("others")
    for title in ("bert 18", "bert 23", "residual 18"):
        build, opset, inputs = EXPORTS[title]
        ir.save(exported(build(), inputs, opset), folder / f"{title.replace(' ', '_')}.onnx")
    return folder


@pytest.mark.parametrize("name", ["bert_18", "bert_23"])
def test_an_encoder_runs_with_nothing_but_its_file(others, tmp_path, name):
    report = run(None, tmp_path / "RUN", SILENT, model=str(others / f"{name}.onnx"))
    assert report.perplexity is None
    assert report.tokens_per_second is None
    assert 0 < report.distance.pruned < report.distance.onnx
    assert report.parameters.after == report.parameters.before - sum(
        group_cost(tmp_path / "RUN", width.name) * (width.before - width.after) for width in report.widths
    )
    assert any("drawn at random" in limit for limit in report.limits)
    assert "Outputs moved, pruned → ONNX" in printed(report)
    page = (tmp_path / "RUN" / "report.html").read_text()
    assert "Perplexity" not in page
    assert "Tokens per second" not in page


@pytest.mark.parametrize(
    ("sizes", "settings", "kinds"),
    [
        ({"ffn": 128, "attention_heads": 4}, {}, ("ffn",)),
        ({"ffn": 64, "attention_heads": 4}, {}, ("ffn", "attention_heads")),
        ({"ffn": 64, "attention_heads": 4}, {"width_multiple": {}}, ("ffn",)),
        ({"hidden": 32, "channels": 8}, {}, ("hidden", "channels")),
        (
            {"ffn": 128, "attention_heads": 4},
            {"kinds": ("ffn", "attention_heads")},
            ("ffn", "attention_heads"),
        ),
    ],
)
def test_heads_go_only_if_asked_for_or_if_nothing_else_can(sizes, settings, kinds):
    session = OnnxRun.__new__(OnnxRun)
    session.recipe = SimpleNamespace(prune=Prune(**settings))
    prunable = [SimpleNamespace(kind=kind, size=size) for kind, size in sizes.items()]
    session.groups = SimpleNamespace(prunable=lambda: prunable)
    assert session.kinds == kinds


def group_cost(folder: Path, name: str) -> int:
    groups = json.loads((folder / "graph" / "groups.json").read_text())["groups"]
    return next(row["parameters_per_unit"] for row in groups if row["name"] == name)


def test_an_encoder_is_calibrated_and_judged_on_text_that_is_given(others, door, tmp_path):
    tokenizer = door / "decoder"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"graphprune: 1\nmodel: {{id: {others / 'bert_18.onnx'}, tokenizer: {tokenizer}}}\n"
        f"data: {{train: {door / 'train.txt'}, evaluate: {door / 'evaluate.txt'}, window: 12, evaluate_window: 16}}\n"
    )
    report = run(recipe, tmp_path / "RUN", SILENT)
    assert "windows of" in report.distance.inputs
    inputs = open_onnx_inputs(load_recipe(recipe), tmp_path)
    worst = max(
        distance(
            tmp_path / "RUN" / "model" / "model.onnx",
            others / "bert_18.onnx",
            {"input_ids": row[None].numpy(), "attention_mask": np.ones((1, 16), np.int64)},
        )
        for row in inputs.evaluate.ids
    )
    assert report.distance.pruned == pytest.approx(worst, rel=1e-3)


def test_a_convolutional_net_is_pruned_and_judged_on_arrays_that_are_given(others, tmp_path):
    pictures = np.random.default_rng(0).standard_normal((9, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "pictures.npz", x=pictures)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"graphprune: 1\nmodel: {others / 'residual_18.onnx'}\ndata: {{inputs: pictures.npz}}\n"
        "prune: {remove: 0.2}\nquantize: {block_size: 16}\n"
    )
    report = run(recipe, tmp_path / "RUN", SILENT)
    assert report.distance.inputs == "pictures.npz"
    last = {"x": pictures[6:]}
    for name, measured in (("model", report.distance.pruned), ("onnx", report.distance.onnx)):
        found = distance(tmp_path / "RUN" / name / "model.onnx", others / "residual_18.onnx", last)
        assert measured == pytest.approx(found, rel=1e-3)
    assert [layer.name for layer in report.layers_quantized] == ["head.weight"]
    assert any("3 weights stay in float" in limit and "it has 4 axes" in limit for limit in report.limits)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 3, 8, 8), np.float32)}, "give as many rows, 3 or more, of each of x"),
        ({"y": np.zeros((9, 3, 8, 8), np.float32)}, r"holds y \(9, 3, 8, 8\)"),
        ({"x": np.zeros((9, 4, 8, 8), np.float32)}, "the model reads float32"),
        ({"x": np.zeros((9, 3, 8, 8), np.int64)}, "'x' is int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(others, tmp_path, arrays, message):
    np.savez(tmp_path / "given.npz", **arrays)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"graphprune: 1\nmodel: {others / 'residual_18.onnx'}\ndata: {{inputs: given.npz}}\n")
    with pytest.raises(SourceError, match=message):
        run(recipe, tmp_path / "RUN", SILENT)
    (tmp_path / "given.npz").write_bytes(b"half of it")
    with pytest.raises(SourceError, match=r"cannot read the arrays.*\n.*numpy\.savez"):
        run(recipe, tmp_path / "RUN", SILENT)
    assert not (tmp_path / "RUN").exists()


class Reader(nn.Module):
    """Logits of each token: of those before it, or of all."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.causal = causal

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        mixed = hidden.cumsum(1) if self.causal else hidden.cumsum(1) + hidden.sum(1, keepdim=True)
        return self.head(self.mix(mixed).tanh())


@pytest.mark.parametrize("causal", [True, False])
def test_a_file_without_a_cache_is_a_decoder_if_no_token_moves_what_comes_before_it(tmp_path, causal):
    ids = torch.arange(10).reshape(2, 5)
    program = torch.onnx.export(
        Reader(causal), (ids,), dynamo=True, opset_version=18, input_names=["input_ids"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},), verbose=False,
    )  # fmt: skip
    program.save(tmp_path / "model.onnx")
    recipe = load_recipe(None, {"model.id": str(tmp_path / "model.onnx")})
    if causal:
        with pytest.raises(RecipeError, match="predicts text"):
            open_onnx_inputs(recipe, tmp_path)
    else:
        assert not open_onnx_inputs(recipe, tmp_path).is_decoder
