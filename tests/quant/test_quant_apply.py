"""LoftQ over a model: which layers are taken, what they compute afterwards, and what is reported."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from quant import LoftQConfig, QuantEmbedding, QuantError, QuantLinear, loftq, loftq_model, quantize


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(hidden)))


class LanguageModel(nn.Module):
    """An embedding, two blocks, and an output head that may be tied to the embedding."""

    def __init__(self, *, tied: bool = True, width: int = 32, vocabulary: int = 50) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


CONFIG = LoftQConfig(rank=4, iterations=2, block_size=16)
TOKENS = torch.arange(12).view(2, 6)
BLOCK_LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def packed_names(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantEmbedding))
    ]


@pytest.mark.parametrize("format", ["nf4", "nf2", "int8"])
def test_each_layer_becomes_its_loftq(format: str) -> None:
    model, original = LanguageModel(), LanguageModel()
    config = LoftQConfig(format=format, rank=4, iterations=2, block_size=16)
    _, reports = loftq_model(model, config)
    assert [report.name for report in reports] == packed_names(model) == BLOCK_LAYERS
    for report in reports:
        layer, weight = model.get_submodule(report.name), original.get_submodule(report.name).weight
        expected = loftq(weight, format, 4, 2, 16)
        assert torch.equal(layer.codes, expected.quantized.codes)
        torch.testing.assert_close(
            layer.weight, expected.quantized.dequantize() + expected.lora_B @ expected.lora_A
        )
        assert report.errors == tuple(expected.errors)
        assert report.format == format
        assert report.shape == tuple(weight.shape)


def test_the_model_computes_what_its_weights_in_effect_compute() -> None:
    model, dense = LanguageModel(), LanguageModel()
    loftq_model(model, LoftQConfig(rank=4, block_size=16, embedding_format="int8"))
    with torch.no_grad():
        for name in packed_names(model):
            dense.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    torch.testing.assert_close(model(TOKENS), dense(TOKENS), rtol=1e-5, atol=1e-5)


def test_a_head_tied_to_the_embedding_is_left_alone_without_an_embedding_format() -> None:
    model = LanguageModel()
    loftq_model(model, CONFIG)
    assert type(model.head) is nn.Linear
    assert type(model.embedding) is nn.Embedding
    assert model.head.weight is model.embedding.weight


def test_an_untied_head_is_a_linear_layer_like_others() -> None:
    model = LanguageModel(tied=False)
    loftq_model(model, LoftQConfig(rank=4, block_size=16, embedding_format="int8"))
    assert isinstance(model.head, QuantLinear)
    assert model.head.rank == 4
    assert type(model.embedding) is nn.Embedding


def test_a_tied_pair_shares_one_storage_counted_once() -> None:
    model = LanguageModel()
    weight = model.embedding.weight.detach().clone()
    _, reports = loftq_model(model, LoftQConfig(rank=4, block_size=16, embedding_format="int8"))
    assert isinstance(model.embedding, QuantEmbedding)
    assert isinstance(model.head, QuantLinear)
    assert model.head.codes is model.embedding.codes
    assert model.head.absmax is model.embedding.absmax
    assert model.head.rank == 0
    expected = quantize(weight, "int8", 32)
    assert torch.equal(model.head.codes, expected.codes)
    counted = {report.name: (report.bytes_before, report.bytes_after) for report in reports}
    assert counted["embedding"] == (weight.nbytes, expected.nbytes)
    assert counted["head"] == (0, 0)


def test_bytes_are_those_of_the_tensors() -> None:
    model = LanguageModel()
    before = sum(each.nbytes for each in {*model.parameters()})
    _, reports = loftq_model(model, LoftQConfig(rank=4, block_size=16, embedding_format="nf4"))
    assert sum(report.bytes_before for report in reports) == before
    kept = {id(each): each.nbytes for each in (*model.parameters(), *model.buffers())}
    assert sum(report.bytes_after for report in reports) == sum(kept.values())


def test_include_and_exclude_choose_by_name() -> None:
    model = LanguageModel()
    loftq_model(model, LoftQConfig(rank=4, include=(r"up$", r"blocks\.1"), exclude=(r"^blocks\.0",)))
    assert packed_names(model) == ["blocks.1.up", "blocks.1.down"]


def test_excluding_one_of_a_tied_pair_leaves_both() -> None:
    model = LanguageModel()
    loftq_model(model, LoftQConfig(rank=4, embedding_format="int8", exclude=("head",)))
    assert packed_names(model) == BLOCK_LAYERS


def test_linear_layers_that_share_a_weight_share_everything() -> None:
    model = LanguageModel()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    _, reports = loftq_model(model, CONFIG)
    first, second = model.blocks[0].up, model.blocks[1].up
    assert first.codes is second.codes
    assert first.lora_A is second.lora_A
    assert first.bias is not second.bias
    assert sum(report.bytes_before == first.bias.nbytes for report in reports) == 1


def test_a_module_used_twice_is_replaced_at_both_places() -> None:
    model = LanguageModel()
    model.blocks[1] = model.blocks[0]
    loftq_model(model, CONFIG)
    assert isinstance(model.blocks[1].up, QuantLinear)
    assert model.blocks[1].up is model.blocks[0].up


def test_only_adapters_and_what_stayed_float_can_train() -> None:
    model = LanguageModel().eval()
    loftq_model(model, LoftQConfig(rank=4, embedding_format="int8"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{side}" for name in BLOCK_LAYERS for side in "AB"}
    assert not any(module.training for module in model.modules())
    model(TOKENS).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)


def test_progress_is_told_after_each_layer() -> None:
    told: list[tuple[str, int, int]] = []
    loftq_model(LanguageModel(), CONFIG, on_layer=lambda *progress: told.append(progress))
    assert told == [(name, done, 4) for done, name in enumerate(BLOCK_LAYERS, 1)]


def test_a_model_in_bfloat16_stays_one() -> None:
    model = LanguageModel().bfloat16()
    loftq_model(model, LoftQConfig(rank=4, embedding_format="int8"))
    assert model(TOKENS).dtype == torch.bfloat16
    assert model.blocks[0].up.lora_A.dtype == torch.float32


@pytest.mark.parametrize("name", ["blocks.1.down.weight", "blocks.1.up.bias"])
def test_a_parameter_that_is_not_finite_is_named_and_nothing_is_changed(name: str) -> None:
    model = LanguageModel()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = torch.nan
    with pytest.raises(QuantError, match=rf"{re.escape(name)} of.* nan"):
        loftq_model(model, CONFIG)
    assert packed_names(model) == []


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Plain(nn.Linear):
    """A subclass that computes what its parent does."""


def test_a_subclass_that_computes_something_else_is_refused_and_a_plain_one_taken() -> None:
    model = nn.Sequential(Plain(16, 16), Doubled(16, 16))
    with pytest.raises(QuantError, match=r"1 \(Doubled\)"):
        loftq_model(model, CONFIG)
    loftq_model(model, LoftQConfig(rank=4, exclude=("1",)))
    assert packed_names(model) == ["0"]


@pytest.mark.parametrize("model", [nn.Linear(16, 16), nn.Sequential(nn.ReLU()), LanguageModel()])
def test_nothing_to_do_is_an_error(model: nn.Module) -> None:
    with pytest.raises(QuantError, match="no linear layer"):
        loftq_model(model, LoftQConfig(include=("absent",)))


class Transposed(nn.Module):
    """A linear layer of another class, which stores (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


@pytest.mark.parametrize("layer", [nn.Linear(16, 16), Transposed()])
def test_a_layer_on_its_own_is_told_what_to_pass(layer: nn.Module) -> None:
    with pytest.raises(
        QuantError, match=rf"this {type(layer).__name__}, which is one itself[^→]*→ .*Sequential"
    ):
        loftq_model(layer, CONFIG)
    loftq_model(nn.Sequential(layer), CONFIG)


def test_a_model_that_is_packed_already_is_told_apart_from_one_without_linear_layers() -> None:
    model = LanguageModel()
    loftq_model(model, CONFIG)
    layers = list(model.modules())
    with pytest.raises(QuantError, match=r"blocks\.0\.up is packed already"):
        loftq_model(model, CONFIG)
    with pytest.raises(QuantError, match="this QuantLinear is left to quantize: it is packed already"):
        loftq_model(model.blocks[0].up, CONFIG)
    with pytest.raises(QuantError, match=r"is to be quantized[^→]*→ widen `include`.* stacked experts$"):
        loftq_model(model, LoftQConfig(include=("absent",)))
    assert list(model.modules()) == layers


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"format": "nf5"}, "nf5"),
        ({"embedding_format": "int9"}, "int9"),
        ({"block_size": 48}, "block of 48"),
        ({"embedding_block_size": 0}, "block of 0"),
        ({"rank": 0}, "rank 0"),
        ({"iterations": -1}, "-1 iterations"),
        ({"include": ("(",)}, "not a regular expression"),
    ],
)
def test_a_wrong_setting_is_refused(setting: dict, match: str) -> None:
    with pytest.raises(QuantError, match=re.escape(match)):
        LoftQConfig(**setting)


def test_a_single_expression_stands_for_itself() -> None:
    config = LoftQConfig(rank=4, block_size=16, include="up", exclude="blocks.1", formats={"up": 2})
    _model, reports = loftq_model(LanguageModel(), config)
    assert [(report.name, report.format) for report in reports] == [("blocks.0.up", "uint2")]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 8.0}, "rank 8.0"),
        ({"rank": True}, "rank True"),
        ({"rank": "8"}, "rank '8'"),
        ({"rank": 0}, "^adapters of rank 0 are not possible"),
        ({"iterations": 1.5}, "1.5 iterations"),
        ({"iterations": -1}, "-1 iterations"),
        ({"block_size": "64"}, "'64' weights"),
        ({"block_size": 64.0}, "64.0 weights"),
        ({"alpha": 0}, "^an alpha of 0 is"),
        ({"propagation": 2}, "^a propagation of 2 is"),
        ({"formats": ("down", 3)}, "are no pairs"),
        ({"formats": 5}, "are no pairs"),
    ],
)
def test_settings_out_of_range_are_refused_one_by_one(settings: dict, match: str) -> None:
    with pytest.raises(QuantError, match=match):
        LoftQConfig(**settings)


def test_what_would_be_ignored_is_refused() -> None:
    for config, match in (
        (LoftQConfig(formats=(("dwon", 3),)), "no layer to quantize has a name with 'dwon'"),
        (LoftQConfig(compensated=True), "without calibration batches"),
    ):
        model = LanguageModel()
        with pytest.raises(QuantError, match=match):
            loftq_model(model, config)
        assert not packed_names(model)
