"""Mixed precision: the paper's rule, and the best choice of formats under a budget against an exhaustive search."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quant import (
    LoftQConfig,
    QuantError,
    QuantLinear,
    loftq,
    loftq_model,
    mix_for_bits,
    mix_for_budget,
    paper_mix,
    quantize,
)
from quant.mix import Choice, _choose, _worth_having


@pytest.mark.parametrize(("bits", "four_bit_blocks"), [(3, 16), (2.5, 8), (2.25, 4), (2, 0), (4, 32)])
def test_the_papers_mixes_of_a_7b_model(bits: float, four_bit_blocks: int) -> None:
    formats = paper_mix([rf"layers\.{i}\." for i in range(32)], bits)
    assert [format for _, format in formats] == ["nf4"] * four_bit_blocks + ["nf2"] * (32 - four_bit_blocks)
    with pytest.raises(QuantError, match="5 bits"):
        paper_mix(["a"], 5)
    with pytest.raises(QuantError, match="single expression 'layers'"):
        paper_mix("layers", 3)


def test_patterns_decide_and_the_first_wins() -> None:
    config = LoftQConfig(format="nf4", formats=((r"down$", 2), (r"^blocks\.0", "uint3")))
    names = ["blocks.0.down", "blocks.0.up", "blocks.1.up"]
    assert [config.format_of(name) for name in names] == ["uint2", "uint3", "nf4"]
    with pytest.raises(QuantError, match="nf9"):
        LoftQConfig(formats=(("a", "nf9"),))
    with pytest.raises(QuantError, match="regular expression"):
        LoftQConfig(formats=(("(", "nf4"),))


def tree() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 16))
    with torch.no_grad():
        model[1].weight.mul_(torch.randn(32, 64).exp())
    return model


def test_the_model_takes_the_mix_and_fits_the_budget() -> None:
    config = LoftQConfig(rank=2, iterations=1, block_size=64)
    smallest = mix_for_budget(tree(), config, 10**6, formats=["uint2"]).nbytes
    largest = mix_for_budget(tree(), config, 10**6).nbytes
    budget = (smallest + largest) // 2
    mix = mix_for_budget(tree(), config, budget)
    assert smallest < mix.nbytes <= budget < largest
    assert len({choice.format for choice in mix.chosen.values()}) > 1
    _, reports = loftq_model(tree(), LoftQConfig(rank=2, iterations=1, block_size=64, formats=mix.formats))
    assert {r.name: r.format for r in reports} == {name: c.format for name, c in mix.chosen.items()}
    biases = sum(layer.bias.nbytes for layer in tree())
    assert sum(report.bytes_after for report in reports) == mix.nbytes + biases
    for name, choice in mix.chosen.items():
        weight = tree()[int(name)].weight
        error = min(loftq(weight, choice.format, 2, 1, 64).errors)
        share = weight.numel() / sum(layer.weight.numel() for layer in tree())
        assert choice.loss == pytest.approx(share * error**2, rel=1e-4)


def test_bits_a_weight_are_of_the_codes_and_scales_alone() -> None:
    config = LoftQConfig(rank=2, iterations=1, block_size=64, exclude=("2",))
    mix = mix_for_bits(tree(), config, 3.6, ["uint2", "uint3", "nf4"])
    assert set(mix.chosen) == {"0", "1"}
    assert len({choice.format for choice in mix.chosen.values()}) > 1
    model, _ = loftq_model(tree(), LoftQConfig(rank=2, block_size=64, exclude=("2",), formats=mix.formats))
    stored = 8 * sum(model[index].quantized.nbytes for index in range(2))
    assert 3 < stored / (2 * 32 * 64) <= 3.6
    with pytest.raises(QuantError, match="0 bits"):
        mix_for_bits(tree(), config, 0)


def test_batches_make_it_the_error_of_the_outputs() -> None:
    config, batch = LoftQConfig(rank=2, iterations=1, block_size=16), torch.randn(50, 32)
    plain, calibrated = (mix_for_budget(tree(), config, 10**6, ["nf4"], b) for b in (None, [batch]))
    assert plain.loss != pytest.approx(calibrated.loss)


def test_a_budget_that_is_too_small_says_what_it_takes() -> None:
    config = LoftQConfig(rank=2, iterations=1, block_size=16)
    least = mix_for_budget(tree(), config, 10**6, formats=["uint2"]).nbytes
    measured: list[str] = []

    def on_layer(name: str, *_: int) -> None:
        measured.append(name)

    with pytest.raises(QuantError, match=re.escape(f"take {least} bytes, the budget is {least - 1}")):
        mix_for_budget(tree(), config, least - 1, on_layer=on_layer)
    with pytest.raises(QuantError, match=r"take 4 bits a weight with their scales, the budget is 2\.6"):
        mix_for_bits(tree(), replace(config, block_size=32), 2.6, on_layer=on_layer)
    assert not measured, "it is known before any layer is measured"
    with pytest.raises(QuantError, match="no linear layer"):
        mix_for_budget(tree(), LoftQConfig(include=("absent",)), 100)


class Tied(nn.Module):
    """A head of the embedding's weight, two layers of one weight, and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 64)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.alone = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.alone(self.second(self.first(self.embedding(tokens)))))


def tied_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("build", [Tied, tied_llama])
@pytest.mark.parametrize("embedding_format", [None, "int8"])
@pytest.mark.parametrize("batches", [None, [torch.arange(40).view(4, 10)]])
def test_the_mix_of_a_tied_model_is_applied_and_its_bytes_are_those_reported(
    build: Callable[[], nn.Module], embedding_format: str | None, batches: list[Tensor] | None
) -> None:
    model = build()
    config = LoftQConfig(rank=2, iterations=1, embedding_format=embedding_format)
    linear = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight is not model.get_parameter(_table(model))
    }
    mix = mix_for_bits(model, config, 3.6, batches=batches)
    _, reports = loftq_model(model, replace(config, formats=mix.formats), batches)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    biases = sum(layer.bias.nbytes for layer in packed.values() if layer.bias is not None)
    assert sum(report.bytes_after for report in reports) == mix.nbytes + biases
    assert mix.nbytes == sum(choice.nbytes for choice in mix.chosen.values())
    formats = {report.name: report.format for report in reports}
    assert {name: formats[name] for name in mix.chosen} == {n: c.format for n, c in mix.chosen.items()}
    # Neither the table nor the head that shares it takes from the bits of the linear layers.
    stored = {layer.codes.data_ptr(): layer.quantized.nbytes for layer in packed.values() if layer.rank}
    bits = 8 * sum(stored.values()) / sum(weight.numel() for weight in linear.values())
    assert len(stored) == len(linear)
    assert 3 < bits <= 3.6


def _table(model: nn.Module) -> str:
    tables = (name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return f"{next(tables)}.weight"


def test_too_few_bits_are_told_in_bits_and_double_quantization_helps() -> None:
    refused = "take 3 bits a weight with their scales, the budget is 2.6\n"
    with pytest.raises(QuantError, match=re.escape(refused) + '.*set scale_storage="double"'):
        mix_for_bits(wide(), LoftQConfig(rank=2, iterations=0), 2.6)
    double = LoftQConfig(rank=2, iterations=0, scale_storage="double", embedding_format="int8")
    assert mix_for_bits(wide(), double, 2.6).nbytes > 0
    with pytest.raises(QuantError, match="the budget is 2\n") as caught:
        mix_for_bits(wide(), double, 2)
    taken = re.search(r"take ([\d.]+) bits a weight", caught.value.problem)
    packed = quantize(wide()[0].weight, "uint2", scale_storage="double")
    assert taken is not None
    assert float(taken[1]) == pytest.approx(8 * packed.nbytes / wide()[0].weight.numel(), rel=1e-4)
    assert "scale_storage" not in caught.value.remedy


def wide() -> nn.Sequential:
    """A linear layer, and a head that is tied to an embedding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Embedding(64, 256), nn.Linear(256, 64))
    model[2].weight = model[1].weight
    return model


@settings(max_examples=100)
@given(
    layers=st.lists(
        st.lists(
            st.tuples(st.integers(1, 60), st.floats(0.001, 1)),
            min_size=1,
            max_size=3,
            unique_by=lambda c: c[0],
        ),
        min_size=1,
        max_size=5,
    ),
    share=st.floats(0, 1),
)
def test_no_choice_of_as_many_bytes_loses_less(layers: list[list[tuple[int, float]]], share: float) -> None:
    measured = {
        str(i): _worth_having([Choice(format=str(n), nbytes=n, loss=loss) for n, loss in choices])
        for i, choices in enumerate(layers)
    }
    least = sum(choices[0].nbytes for choices in measured.values())
    most = sum(choices[-1].nbytes for choices in measured.values())
    budget = int(least + share * (most - least))
    mix = _choose(measured, budget)
    assert mix.nbytes <= budget
    best = min(
        sum(loss for _, loss in choice) for choice in product(*layers) if sum(n for n, _ in choice) <= budget
    )
    # The greedy choice is optimal but for what does not fit any more: at most one layer's step.
    steps = [a.loss - b.loss for choices in measured.values() for a, b in pairwise(choices)]
    assert best - 1e-9 <= mix.loss <= best + max(steps, default=0.0) + 1e-9


def test_what_cannot_be_mixed_is_refused() -> None:
    config = LoftQConfig(rank=2, iterations=1, block_size=16)
    for arguments, match in (
        ({"loss": lambda output: output}, "without calibration batches"),
        ({"formats": ()}, "no format to choose from"),
        ({"nbytes": float("nan")}, "a budget of nan"),
    ):
        with pytest.raises(QuantError, match=match):
            mix_for_budget(**{"model": tree(), "config": config, "nbytes": 10**6, **arguments})
    assert {c.format for c in mix_for_budget(tree(), config, 10**6, "nf4").chosen.values()} == {"nf4"}
