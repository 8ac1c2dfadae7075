"""Recovery on a tiny quantized Llama: what changes, what it reaches, and where it goes on."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_llama

from graphprune.errors import RecipeError, TrainingError
from graphprune.recipe import Recover, Training
from graphprune.recover import course
from graphprune.recover.recovery import recover
from graphprune.recover.sources import Source
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
    return Recover(steps=changes.pop("steps", 20), training=training, **changes)


def plain(windows):
    return [Source("train", "text", windows, None)]


def adapters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def text(seed, low, high, count=12, window=16):
    """Windows in which each token but the first follows from the one before it, so that there is much to learn."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(low, high, (count, 1), generator=generator)
    return Windows((first - low + 3 * torch.arange(window)) % (high - low) + low, f"text {seed}")


def likely(dense):
    """Windows that the dense model writes itself: whatever else is learned makes them less likely."""
    with torch.no_grad():
        return Windows(
            dense.generate(torch.arange(40, 44)[:, None], max_new_tokens=15, do_sample=False), "own"
        )


def sources(*kinds):
    """One source a kind, each over tokens of its own, with four windows held out."""
    made = []
    for place, kind in enumerate(kinds):
        windows = text(place, 3 + 15 * place, 18 + 15 * place)
        held, train = windows.chosen(torch.arange(4)), windows.chosen(torch.arange(4, 12))
        made.append(Source(f"s{place}", kind, train, held))
    return made


def test_only_adapters_change(quantized, dense, windows):
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    recover(quantized, dense, settings(steps=3), plain(windows), seed=0)
    changed = {
        name for name, tensor in quantized.state_dict().items() if not torch.equal(before[name], tensor)
    }
    assert changed == {name for name in before if "lora_" in name}


def test_one_text_in_one_round_is_a_plain_training_loop(quantized, windows):
    """Ten lines of AdamW, warm-up, cosine and clipping come to the same adapters."""
    reference = copy.deepcopy(quantized)
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    batches = windows.batches(4, 0)
    for step in range(7):
        rate = 0.5 if step == 0 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / 6))
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        optimizer.zero_grad()
        ids = next(batches)
        logits = reference(input_ids=ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    recover(quantized, None, settings(steps=7), plain(windows), seed=0)
    for name, value in adapters_of(reference).items():
        torch.testing.assert_close(adapters_of(quantized)[name], value, rtol=1e-4, atol=1e-6)


def test_distillation_brings_the_model_nearer_to_the_dense_one(quantized, dense, windows):
    def divergence():
        with torch.no_grad():
            p = dense(input_ids=windows.ids).logits.log_softmax(-1)
            q = quantized(input_ids=windows.ids).logits.log_softmax(-1)
        return float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))

    before = divergence()
    recover(quantized, dense, settings(training={"distill": 5.0}), plain(windows), seed=0)
    assert divergence() < 0.9 * before


def test_learning_from_text_alone_lowers_its_perplexity(quantized, windows):
    before = perplexity(torch_logits(quantized), windows)
    recovered = recover(quantized, None, settings(), plain(windows), seed=0)
    assert perplexity(torch_logits(quantized), windows) < 0.9 * before
    assert [row["step"] for row in recovered.rows] == list(range(20))
    assert recovered.rounds == []
    assert recovered.best is None


def test_a_model_without_adapters_is_refused(dense, windows):
    model = copy.deepcopy(dense).requires_grad_(False)
    with pytest.raises(TrainingError, match="no adapters to train"):
        recover(model, None, settings(), plain(windows), seed=0)


def test_rounds_measure_every_source_against_the_dense_model(quantized, dense):
    """Losses are those of the definition, by perplexity; text comes before instructions; steps are shared equally."""
    mixed = sources("instruct", "text", "text")
    recovered = recover(quantized, dense, settings(rounds=2, patience=9), mixed, seed=0)
    assert [(row.phase, row.number, row.step) for row in recovered.rounds] == [
        ("text", 0, 0), ("text", 1, 5), ("text", 2, 10),
        ("instruct", 0, 10), ("instruct", 1, 15), ("instruct", 2, 20),
    ]  # fmt: skip
    best = recovered.best
    for source in mixed:
        ours = math.log(perplexity(torch_logits(quantized), source.held_out))
        theirs = math.log(perplexity(torch_logits(dense), source.held_out))
        assert best.losses[source.name] == pytest.approx(ours, abs=1e-5)
        assert best.degradation[source.name] == pytest.approx(ours - theirs, abs=1e-5)
    assert [set(row.mix) for row in recovered.rounds[1:3]] == [{"s1", "s2"}] * 2
    assert [row.mix for row in recovered.rounds[4:]] == [{"s0": 1.0}] * 2
    assert recovered.rounds[0].mix == {}


def test_the_source_that_lost_more_gets_more_of_the_next_round(quantized, dense):
    recovered = recover(
        quantized,
        dense,
        settings(rounds=3, patience=9, floor=0.2, temperature=0.1),
        sources("text", "text"),
        seed=0,
    )
    for before, after in zip(recovered.rounds, recovered.rounds[1:], strict=False):
        worst = max(before.degradation, key=before.degradation.get)
        assert after.mix[worst] == max(after.mix.values()) > 0.5


@pytest.mark.parametrize("misled", [True, False])
def test_what_remains_is_never_worse_than_what_was(quantized, dense, misled):
    """Where all that is learned makes the measured text worse, the adapters of the start remain."""
    mixed = sources("text", "instruct")
    if misled:
        mixed = [replace(source, held_out=likely(dense)) for source in mixed]
    chosen = settings(rounds=3, steps=48, patience=9, training={"distill": 0.0})
    start = adapters_of(quantized)
    recovered = recover(quantized, dense, chosen, mixed, seed=0)
    means = [row.mean for row in recovered.rounds]
    assert recovered.best.mean == min(means) <= means[0]
    assert equal(adapters_of(quantized), start) == (recovered.best.step == 0) == misled
    first, second = recovered.rounds[:4], recovered.rounds[4:]
    assert second[0].degradation == min(first, key=lambda row: row.mean).degradation
    again = recover(quantized, dense, chosen.model_copy(update={"steps": 0}), mixed, seed=0)
    assert again.rounds[0].degradation == recovered.best.degradation


def test_a_phase_ends_when_no_source_improves(quantized, dense):
    chosen = settings(rounds=6, steps=12, patience=2, least_improvement=100.0)
    recovered = recover(quantized, dense, chosen, sources("text", "instruct"), seed=0)
    assert [row.number for row in recovered.rounds] == [0, 1, 2, 0, 1, 2]
    assert len(recovered.rows) == 4


class Killed(BaseException):
    pass


def killed_after(rounds, monkeypatch):
    """Have the process die in the middle of the round after so many."""
    begun, train = 0, course.train

    def dying(batches, *args, **kwargs):
        nonlocal begun
        begun += 1
        if begun > rounds:
            raise Killed
        return train(batches, *args, **kwargs)

    monkeypatch.setattr(course, "train", dying)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_recovery_that_was_killed_goes_on_and_ends_bit_for_bit_the_same(
    quantized, dense, tmp_path, monkeypatch, rounds
):
    chosen, mixed = (
        settings(rounds=2, steps=12, patience=9, accumulate=2),
        sources("text", "text", "instruct"),
    )
    straight = copy.deepcopy(quantized)
    undisturbed = recover(straight, dense, chosen, mixed, seed=3)
    with monkeypatch.context() as patch:
        killed_after(rounds, patch)
        with pytest.raises(Killed):
            recover(copy.deepcopy(quantized), dense, chosen, mixed, seed=3, checkpoint=tmp_path / "kept")
    seen = []
    resumed = recover(
        quantized, dense, chosen, mixed, seed=3, checkpoint=tmp_path / "kept",
        progress=lambda row: seen.append(row["step"]),
    )  # fmt: skip
    assert seen == list(range(3 * rounds, 12))
    assert resumed == undisturbed
    assert equal(adapters_of(quantized), adapters_of(straight))


def test_a_finished_recovery_is_not_done_again(quantized, dense, tmp_path):
    first = copy.deepcopy(quantized)
    chosen, mixed = settings(rounds=2, steps=4), sources("text")
    done = recover(first, dense, chosen, mixed, seed=0, checkpoint=tmp_path)
    seen = []
    assert recover(quantized, dense, chosen, mixed, seed=0, checkpoint=tmp_path, progress=seen.append) == done
    assert seen == []
    assert equal(adapters_of(quantized), adapters_of(first))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize("change", ["seed", "settings", "base"])
def test_a_checkpoint_of_something_else_is_not_gone_on_from(quantized, dense, tmp_path, change):
    chosen, mixed = settings(rounds=2, steps=4), sources("text")
    recover(copy.deepcopy(quantized), dense, chosen, mixed, seed=0, checkpoint=tmp_path)
    seed = 1 if change == "seed" else 0
    if change == "settings":
        chosen = chosen.model_copy(update={"floor": 0.1})
    if change == "base":
        with torch.no_grad():
            quantized.model.norm.weight[0] += 1
    seen = []
    recover(quantized, dense, chosen, mixed, seed=seed, checkpoint=tmp_path, progress=seen.append)
    assert len(seen) == 4


def test_a_checkpoint_that_is_broken_is_named(quantized, dense, tmp_path):
    chosen, mixed = settings(rounds=2, steps=4), sources("text")
    recover(copy.deepcopy(quantized), dense, chosen, mixed, seed=0, checkpoint=tmp_path)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"checkpoint in .* cannot be read") as caught:
        recover(quantized, dense, chosen, mixed, seed=0, checkpoint=tmp_path)
    assert "remove that folder" in str(caught.value)


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_checkpoint(
    quantized, dense, tmp_path, monkeypatch
):
    """In the second round, at step 5: the message names it, and the first round is still there."""
    chosen, mixed = settings(rounds=3, steps=12, patience=9), sources("text")
    batches, untouched = course.Mixer.batches, copy.deepcopy(quantized)

    def poisoned(self, shares, step):
        for number, batch in enumerate(batches(self, shares, step), step):
            if number == 5:
                with torch.no_grad():
                    next(p for p in quantized.parameters() if p.requires_grad).fill_(float("nan"))
            yield batch

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(course.Mixer, "batches", poisoned)
        with pytest.raises(TrainingError, match="the loss became nan at step 5"):
            recover(
                quantized,
                dense,
                chosen,
                mixed,
                seed=0,
                checkpoint=tmp_path,
                progress=lambda r: seen.append(r["step"]),
            )
    assert seen == [0, 1, 2, 3, 4]
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["number"], len(state["rows"])) == (1, 4)
    resumed = recover(quantized, dense, chosen, mixed, seed=0, checkpoint=tmp_path)
    assert resumed == recover(untouched, dense, chosen, mixed, seed=0)


def test_a_measure_that_is_not_finite_is_no_measure(quantized, dense):
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="after step 0, the loss on 's0' is nan"):
        recover(quantized, broken, settings(training={"distill": 0.0}), sources("text"), seed=0)


def test_rounds_without_steps_or_without_anything_held_out_are_refused(quantized, dense, windows):
    with pytest.raises(RecipeError, match=r"recover\.steps is 3, and there are 4 rounds"):
        recover(quantized, dense, settings(steps=3, rounds=2), sources("text", "instruct"), seed=0)
    with pytest.raises(RecipeError, match="'train' holds nothing out"):
        recover(quantized, dense, settings(rounds=2), plain(windows), seed=0)
    with pytest.raises(TrainingError, match="no dense model"):
        recover(quantized, None, settings(), sources("text"), seed=0)
