"""Layers of different widths, saved and opened again as the stock class."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomized, tiny_llama, traced

import graphprune as gp
from graphprune.errors import ShrinkError, SourceError
from graphprune.shrink.load import RECORD, Difference, is_uneven
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan

IDS = torch.arange(20).reshape(2, 10) + 3


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=67,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=2,
    )
    return randomized(Qwen3ForCausalLM(config))


def gpt2():
    """A Conv1D keeps its width in ``nf``, attention the place where it splits queries from keys."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=67, n_positions=64, eos_token_id=2)
    return randomized(GPT2LMHeadModel(config))


def llama():
    return tiny_llama(num_hidden_layers=3)


def uneven(build):
    own = traced(build())
    channels, heads = own.of_kind("ffn"), own.of_kind("attention_heads")
    plan = Plan({channels[0]: range(8), channels[2]: range(5, 25), heads[1]: [0]})
    return shrink(own.model, own.groups, plan, own.inputs, form="module")


def saved(model, folder):
    gp.save(model, folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


BUILDS = pytest.mark.parametrize("build", [llama, qwen3, gpt2], ids=lambda build: build.__name__)


def test_a_process_of_its_own_computes_the_same(tmp_path):
    small = {build.__name__: uneven(build) for build in (llama, qwen3, gpt2)}
    code = """
import sys, torch, graphprune as gp
from safetensors.torch import load_file, save_file
ids = load_file(sys.argv[1])["ids"]
for folder in sys.argv[2:]:
    model = gp.load(folder)
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    assert len(output.hidden_states) == 4 and not model.training
    assert type(model).__module__.startswith("transformers.")
    runs = [
        model.generate(
            ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=12, min_new_tokens=12, do_sample=False,
            use_cache=use_cache, pad_token_id=0,
        )
        for use_cache in (True, False)
    ]
    save_file({"logits": output.logits, "cached": runs[0], "uncached": runs[1]}, f"{folder}.safetensors")
"""
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    folders = [str(saved(model, tmp_path / name)) for name, model in small.items()]
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ids.safetensors"), *folders],
        check=True,
        capture_output=True,
    )
    for name, model in small.items():
        out = load_file(tmp_path / f"{name}.safetensors")
        assert torch.equal(out["logits"], logits(model))
        assert torch.equal(out["cached"], out["uncached"])
        assert out["cached"].shape == (1, 22)


@BUILDS
def test_what_is_opened_is_what_was_saved(build, tmp_path):
    small = uneven(build)
    again = gp.load(saved(small, tmp_path / "model"))
    assert type(again) is type(small)
    ours, theirs = dict(again.named_modules()), dict(small.named_modules())
    assert ours.keys() == theirs.keys()
    for path, module in theirs.items():
        numbers = {name: value for name, value in vars(module).items() if type(value) in (int, float)}
        assert {name: vars(ours[path])[name] for name in numbers} == numbers
    for name, weight in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert all(weight.requires_grad for weight in again.parameters())
    tied = small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    assert Difference.of(again) == Difference.of(small)


def test_it_saves_and_opens_a_second_time_and_in_another_type(tmp_path):
    first = gp.load(saved(uneven(qwen3), tmp_path / "first"), torch.bfloat16)
    assert {weight.dtype for weight in first.parameters()} == {torch.bfloat16}
    second = gp.load(saved(first, tmp_path / "second"))
    assert {weight.dtype for weight in second.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(first), logits(second))


def test_stock_transformers_refuses_the_folder_and_reads_no_layer_wrongly(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = saved(uneven(llama), tmp_path / "model")
    assert is_uneven(folder)
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_without_a_record_is_opened_as_any_other(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    assert not is_uneven(tmp_path)
    assert torch.equal(logits(gp.load(tmp_path)), logits(model))
    assert Difference.of(model) == Difference()


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("{", "does not say what the layers are"),
        (
            '{"layers": {"shapes": {"model.layers.0.mlp.up_proj.weight": ["40", 32]}}}',
            "does not say what the",
        ),
        ('{"layers": {"shape": {}}}', "does not say what the layers are"),
        (
            '{"layers": {"shapes": {"model.layers.9.mlp.up_proj.weight": [40, 32]}}}',
            "speaks of 'model.layers.9",
        ),
        ('{"layers": {"shapes": {"model.layers.0.mlp.bias": [40]}}}', "speaks of 'model.layers.0.mlp.bias'"),
        ('{"layers": {"attributes": {"model.norm": {"forward": 1}}}}', "speaks of 'model.norm.forward'"),
        ('{"layers": {"attributes": {"model.norm": {"training": 1}}}}', "speaks of 'model.norm.training'"),
        ('{"layers": {"shapes": {"model.layers.0.mlp.up_proj.weight": [9, 32]}}}', "cannot open"),
    ],
)
def test_a_record_that_does_not_fit_is_named(tmp_path, record, problem):
    llama().save_pretrained(tmp_path)
    (tmp_path / RECORD).write_text(record)
    with pytest.raises(SourceError, match=problem):
        gp.load(tmp_path)


def test_what_cannot_be_opened_again_is_not_recorded():
    small = llama()
    small.model.rotary_emb.inv_freq = small.model.rotary_emb.inv_freq[:2]
    with pytest.raises(ShrinkError, match=r"inv_freq' is computed from the configuration"):
        Difference.of(small)
    extended = llama()
    extended.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ShrinkError, match=r"has other weights: 'extra\.bias'"):
        Difference.of(extended)
    with pytest.raises(SourceError, match="there is no"):
        gp.load("owner/name")
