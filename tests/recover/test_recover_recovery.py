from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_llama

from graphprune.errors import TrainingError
from graphprune.recipe import Recover, Training
from graphprune.recover.recovery import recover
from graphprune.source.perplexity import perplexity, torch_logits
from graphprune.source.text import Windows
from quant import LoftQConfig, loftq_model


@pytest.fixture(scope="module")
def dense():
    return tiny_llama(seed=2)


@pytest.fixture
def quantized(dense):
    model = copy.deepcopy(dense)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loftq_model(model, LoftQConfig(format="nf2", block_size=16, rank=4, iterations=1))
    return model


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(0)
    return Windows(torch.randint(3, 60, (8, 16), generator=generator), "random")


def settings(**changes):
    training = Training(learning_rate=1e-2, batch_size=4, precision="float32", **changes.pop("training", {}))
    return Recover(steps=changes.pop("steps", 20), training=training)


def test_only_adapters_change(quantized, dense, windows):
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    recover(quantized, dense, settings(steps=3), windows, seed=0)
    changed = {
        name for name, tensor in quantized.state_dict().items() if not torch.equal(before[name], tensor)
    }
    assert changed == {name for name in before if "lora_" in name}


def test_distillation_brings_the_model_nearer_to_the_dense_one(quantized, dense, windows):
    def divergence():
        with torch.no_grad():
            p = dense(input_ids=windows.ids).logits.log_softmax(-1)
            q = quantized(input_ids=windows.ids).logits.log_softmax(-1)
        return float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))

    before = divergence()
    recover(quantized, dense, settings(training={"distill": 5.0}), windows, seed=0)
    assert divergence() < 0.9 * before


def test_learning_from_text_alone_lowers_its_perplexity(quantized, windows):
    before = perplexity(torch_logits(quantized), windows)
    rows = recover(quantized, None, settings(), windows, seed=0)
    assert perplexity(torch_logits(quantized), windows) < 0.9 * before
    assert [row["step"] for row in rows] == list(range(20))


def test_the_same_seed_gives_the_same_adapters(quantized, dense, windows):
    other = copy.deepcopy(quantized)
    recover(quantized, dense, settings(steps=4), windows, seed=1)
    recover(other, dense, settings(steps=4), windows, seed=1)
    ours, theirs = quantized.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_without_adapters_is_refused(dense, windows):
    model = copy.deepcopy(dense).requires_grad_(False)
    with pytest.raises(TrainingError, match="no adapters to train"):
        recover(model, None, settings(), windows, seed=0)
