"""A smaller model saved: what opens it, and what stays of a folder that is not empty."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama, traced
from transformers import AutoModelForCausalLM

import graphprune as gp
from graphprune.errors import ShrinkError
from graphprune.shrink.load import KEY, RECORD, is_uneven
from graphprune.source.adapters import attach_adapters

IDS = torch.arange(20).reshape(2, 10) + 3


def cut(**channels: range) -> torch.nn.Module:
    """Return a Llama of two layers without these channels of each feed-forward layer."""
    own = traced(tiny_llama())
    plan = gp.Plan(dict(zip(own.of_kind("ffn"), channels.values(), strict=False)))
    return gp.shrink(own.model, own.groups, plan, own.inputs)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_configuration_that_says_the_widths_is_enough_for_stock_transformers(tmp_path):
    small = cut(first=range(8), second=range(4, 12))
    gp.save(small, tmp_path / "new" / "folder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(logits(again), logits(small))
    assert not is_uneven(tmp_path / "new" / "folder")


def test_saved_anew_the_folder_is_that_of_the_new_model_alone(tmp_path):
    uneven, even = cut(first=range(8)), cut(first=range(8), second=range(8))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    uneven.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    gp.save(uneven, tmp_path)
    assert torch.equal(logits(gp.load(tmp_path)), logits(uneven))
    gp.save(even, tmp_path)
    assert KEY not in json.loads((tmp_path / RECORD).read_text())
    assert torch.equal(logits(gp.load(tmp_path)), logits(even))
    assert tokenizer.read_text() == "{}"
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert not list(tmp_path.glob(".*"))


def extended() -> torch.nn.Module:
    model = tiny_llama()
    model.extra = torch.nn.Linear(2, 2)
    return model


def mixed() -> torch.nn.Module:
    model = tiny_llama()
    model.model.layers[0].mlp.to(torch.bfloat16)
    return model


def adapted() -> torch.nn.Module:
    return attach_adapters(tiny_llama(), 2, 2)


def gated() -> torch.nn.Module:
    model = adapted()
    groups = gp.node_groups(gp.trace(model, {"input_ids": IDS}))
    gp.LHSPG(gp.param_groups(model, groups), remove=0.2, warmup_steps=1, periods=1, period_steps=1)
    return model.merge_and_unload()


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (adapted, "has adapters beside its weights"),
        (gated, "still has the gates"),
        (lambda: torch.nn.Linear(2, 2), "a Linear is no transformers model"),
        (extended, r"has other weights: 'extra\.bias'"),
        (mixed, r"'model\.layers\.0\.mlp\.down_proj\.weight' is another one when the folder is opened again"),
    ],
)
def test_what_would_not_be_opened_again_leaves_the_folder_as_it_was(build, problem, tmp_path):
    kept = cut(first=range(8))
    gp.save(kept, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ShrinkError, match=problem):
        gp.save(build(), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_is_no_folder(tmp_path):
    place = tmp_path / "model"
    place.write_text("mine")
    with pytest.raises(ShrinkError, match="is a file"):
        gp.save(tiny_llama(), place)
    assert place.read_text() == "mine"
