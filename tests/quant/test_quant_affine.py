"""Layers that compute x Wᵀ + b in words of their own: told from all others, packed, saved and loaded like nn.Linear."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from quant import (
    LoftQConfig,
    QuantError,
    QuantLinear,
    load_quantized_,
    loftq_model,
    mix_for_bits,
    save_quantized,
)
from quant.affine import affine_layout

SIZES = st.integers(1, 40)


class Spelled(nn.Linear):
    """A subclass that spells the product out, as Falcon's does."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(super().forward(input), 0.5, self.training)


class Biased(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Pair(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input), input


class Masked(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.register_buffer("mask", torch.ones(rows, columns))

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight * self.mask, self.bias)


class Rows(nn.Module):
    """The matrix is looked up, not multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input.long()]


@given(SIZES, SIZES, st.booleans())
def test_every_way_to_write_the_product_is_known(columns: int, rows: int, has_bias: bool) -> None:
    assert affine_layout(nn.Linear(columns, rows, has_bias)) == "out, in"
    assert affine_layout(Spelled(columns, rows, has_bias)) == "out, in"
    assert affine_layout(Conv1D(rows, columns)) == ("in, out" if (rows, columns) != (1, 1) else "out, in")


@pytest.mark.parametrize(
    "layer",
    [
        Doubled(6, 6),
        Dropping(6, 6),
        Biased(6, 6),
        Pair(6, 6),
        Masked(6, 6),
        Rows(),
        nn.Embedding(6, 6),
        nn.LayerNorm(6),
        nn.Bilinear(6, 6, 6),
        nn.Conv1d(6, 6, 1),
        nn.Sequential(nn.Linear(6, 6)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_whatever_computes_more_is_none(layer: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert affine_layout(layer.eval()) is None
    assert not layer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Conv1D(48, 32), Spelled(48, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(torch.relu(self.first(x))))


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    model = Block()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def twin(model: Block) -> nn.Sequential:
    """Return the same function, of nn.Linear alone."""
    found = nn.Sequential(
        OrderedDict(
            first=nn.Linear(32, 48), relu=nn.ReLU(), second=nn.Linear(48, 32), third=nn.Linear(32, 32)
        )
    )
    with torch.no_grad():
        for name, layer in model.named_children():
            weight = layer.weight.T if name == "first" else layer.weight
            found.get_submodule(name).load_state_dict({"weight": weight, "bias": layer.bias})
    return found


CONFIG = LoftQConfig(format="uint3", block_size=16, rank=2, iterations=2)
TEXT = [torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.mark.parametrize("calibrated", [False, True])
def test_they_become_what_an_nn_linear_of_the_same_numbers_becomes(calibrated: bool) -> None:
    model = block()
    other = twin(model)
    torch.testing.assert_close(model(TEXT[0]), other(TEXT[0]))
    ours, theirs = (loftq_model(each, CONFIG, TEXT if calibrated else None)[1] for each in (model, other))
    assert [report.name for report in ours] == ["first", "second", "third"]
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.format, mine.bytes_after) == (its.shape, its.format, its.bytes_after)
        assert mine.errors == pytest.approx(its.errors, rel=1e-4)
    assert all(isinstance(layer, QuantLinear) for layer in model.children())
    torch.testing.assert_close(model(TEXT[0]), other(TEXT[0]), atol=1e-3, rtol=1e-3)


def test_they_come_back_from_a_folder_bit_for_bit(tmp_path: Path) -> None:
    model = block()
    loftq_model(model, CONFIG)
    save_quantized(model, tmp_path)
    fresh = block(seed=1)
    load_quantized_(fresh, tmp_path)
    assert [type(layer) for layer in fresh.children()] == [QuantLinear] * 3
    assert torch.equal(model(TEXT[0]), fresh(TEXT[0]))
    save_quantized(fresh, tmp_path / "again")
    assert (tmp_path / "again" / "quant.json").read_bytes() == (tmp_path / "quant.json").read_bytes()
    other = twin(block(seed=2))  # nn.Linear of the same shapes takes them as well
    load_quantized_(other, tmp_path)
    assert torch.equal(model(TEXT[0]), other(TEXT[0]))


def test_a_square_weight_is_loaded_the_way_it_was_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, fresh = (nn.Sequential(Conv1D(32, 32)) for _ in range(2))
    loftq_model(model, CONFIG)
    save_quantized(model, tmp_path)
    load_quantized_(fresh, tmp_path)
    assert torch.equal(model(TEXT[0]), fresh(TEXT[0]))
    with pytest.raises(
        QuantError, match=r"0 is a LayerNorm of shape \(32,\) in the model, but a stored linear"
    ):
        load_quantized_(nn.Sequential(nn.LayerNorm(32)), tmp_path)


def test_layers_that_share_a_transposed_weight_share_its_codes() -> None:
    model = nn.Sequential(Conv1D(32, 32), nn.ReLU(), Conv1D(32, 32))
    model[2].weight = model[0].weight
    loftq_model(model, CONFIG)
    assert model[0].codes is model[2].codes
    assert model[0].lora_A is model[2].lora_A


def test_a_mix_leaves_them_as_they_were() -> None:
    model = block()
    layers = list(model.children())
    mix = mix_for_bits(model, CONFIG, 7.5, ("uint2", "uint4"), TEXT)
    assert len(mix.formats) == 3
    assert list(model.children()) == layers


def test_what_computes_more_is_refused_by_name_and_nothing_is_touched() -> None:
    model = block()
    model.third = Doubled(32, 32)
    layers = list(model.children())
    with pytest.raises(QuantError, match=r"third \(Doubled\) computes more than an Linear"):
        loftq_model(model, CONFIG)
    assert list(model.children()) == layers
