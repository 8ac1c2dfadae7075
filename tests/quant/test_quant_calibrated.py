"""Calibrated LoftQ over a model: what is measured, what counts as a chain, and that it beats LoftQ without data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant import InputNorm, LoftQConfig, QuantError, QuantLinear, collect_covariances, loftq_model
from quant.chain import find_chain
from quant.covariance import propagated_target
from quant.sequential import quantize_chain


class Block(nn.Module):
    """A gated residual block: two layers share an input, and the last has its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        normed = self.norm(hidden)
        return hidden + scale * self.down(torch.relu(self.gate(normed)) * self.up(normed))


class Model(nn.Module):
    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Real activations are correlated: most of their variance lies in few directions.
        spread = torch.logspace(0.5, -1, width)
        self.embedding = nn.Embedding.from_pretrained(
            torch.randn(40, width) * spread @ torch.randn(width, width)
        )
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, scale=1.0 + index)
        return self.head(hidden)


class Parallel(Model):
    """All blocks read the embedding: no chain."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.head(torch.stack([block(hidden) for block in self.blocks]).sum(dim=0))


class Interrupted(Model):
    """Something happens between the blocks."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(hidden)


class Straight(Model):
    """The blocks are linear layers themselves: what each of them gets can be measured at once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (4, 24), generator=generator) for _ in range(count)]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_covariances_are_the_mean_outer_products_of_the_inputs() -> None:
    model = Model()
    found = collect_covariances(model, batches(), ["head", "blocks.1.up"])
    seen: dict[str, list[Tensor]] = {"head": [], "blocks.1.up": []}
    for name, rows in seen.items():
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, __, rows=rows: rows.append(inputs[0].flatten(0, 1))
        )
    with torch.no_grad():
        for batch in batches():
            model(batch)
    for name, rows in seen.items():
        x = torch.cat(rows).double()
        torch.testing.assert_close(found[name].double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_a_layer_that_nothing_reaches_is_left_out_and_no_batch_is_an_error() -> None:
    model = Model()
    model.unused = nn.Linear(32, 8)
    assert set(collect_covariances(model, batches(), ["unused", "head"])) == {"head"}
    with pytest.raises(QuantError, match="no calibration batch"):
        collect_covariances(model, [], ["head"])
    with pytest.raises(QuantError, match="no calibration batch"):
        loftq_model(model, LoftQConfig(rank=2), [])
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_the_model_keeps_its_mode() -> None:
    model = Model().train()
    model.blocks[1].eval()
    loftq_model(model, LoftQConfig(rank=2, iterations=1, block_size=16), batches())
    assert model.training
    assert model.blocks[0].up.training
    assert not model.blocks[1].training


def test_a_chain_is_seen_and_its_blocks_run_as_they_do_in_the_model() -> None:
    model = Model().eval()
    chain = find_chain(model, batches(), list(linears(model)))
    assert chain is not None
    assert (chain.name, list(chain.blocks)) == ("blocks", list(model.blocks))
    for index, batch in enumerate(batches()):
        hidden = chain.hidden[index]
        for calls, block in zip(chain.calls, chain.blocks, strict=True):
            hidden = calls[index].run(block, hidden)
        torch.testing.assert_close(model.head(hidden), model(batch))


@pytest.mark.parametrize("kind", [Parallel, Interrupted, Straight])
def test_what_is_no_chain_is_not_taken_for_one(kind: Callable[[], Model]) -> None:
    model = kind().eval()
    assert find_chain(model, batches(), list(linears(model))) is None
    reference, before = model(batches()[0]), copy.deepcopy(model)
    errors = {}
    for name, text in (("plain", None), ("calibrated", batches())):
        small = copy.deepcopy(before)
        loftq_model(small, LoftQConfig(format=2, rank=2, block_size=16), text)
        errors[name] = float((small(batches()[0]) - reference).norm())
    assert errors["calibrated"] < 0.7 * errors["plain"]


def test_calibration_beats_loftq_on_text_it_did_not_see() -> None:
    model = Model().eval()
    unseen = torch.randint(0, 40, (16, 24), generator=torch.Generator().manual_seed(7))
    reference = model(unseen)
    errors = {}
    for name, text, propagation in (
        ("plain", None, 0.0),
        ("local", batches(8), 0.0),
        ("both", batches(8), 0.5),
    ):
        small = copy.deepcopy(model)
        config = LoftQConfig(format=2, rank=2, block_size=16, iterations=3, propagation=propagation)
        loftq_model(small, config, text)
        errors[name] = float((small(unseen) - reference).norm() / reference.norm())
    assert errors["both"] < errors["local"] < 0.6 * errors["plain"]


def test_each_layer_is_measured_after_those_before_it_are_compressed() -> None:
    """What reaches `compress` is compared with the inputs that the half-compressed model really gives."""
    model = Model(blocks=3).eval()
    dense = copy.deepcopy(model)
    layers = {name: layer for name, layer in linears(model).items() if name != "head"}
    chain = find_chain(model, batches(), list(layers))
    assert chain is not None
    order: list[str] = []

    def compress(name: str, target: Tensor, covariance: Tensor | None) -> None:
        inputs = {}
        for key, tree in (("now", model), ("dense", dense)):
            rows: list[Tensor] = []
            hook = tree.get_submodule(name).register_forward_hook(
                lambda _, seen, __, rows=rows: rows.append(seen[0].flatten(0, 1))
            )
            with torch.no_grad():
                for batch in batches():
                    tree(batch)
            hook.remove()
            inputs[key] = torch.cat(rows)
        x, before = inputs["now"], inputs["dense"]
        torch.testing.assert_close(covariance, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        weight = dense.get_submodule(name).weight
        # Least squares towards the dense outputs: the target must do better on them than the weight does.
        wanted = before @ weight.T
        assert (x @ target.T - wanted).norm() <= (x @ weight.T - wanted).norm() * (1 + 1e-5)
        # A crude compression, so that what follows is shifted.
        with torch.no_grad():
            model.get_submodule(name).weight.copy_((target * 8).round() / 8)
        order.append(name)

    quantize_chain(chain, layers, 1.0, compress)
    assert order == [f"blocks.{i}.{name}" for i in range(3) for name in ("gate", "up", "down")]


def test_layers_with_one_input_are_measured_each_by_its_own_importance() -> None:
    model = Model(blocks=2).eval()
    layers = {name: layer for name, layer in linears(model).items() if name != "head"}
    chain = find_chain(model, batches(), list(layers))
    assert chain is not None
    generator = torch.Generator().manual_seed(3)
    importance = {
        f"blocks.0.{name}": [torch.rand(96, generator=generator) for _ in batches()]
        for name in ("gate", "up")
    }
    found: dict[str, Tensor | None] = {}
    quantize_chain(chain, layers, 0.0, lambda name, _, each: found.update({name: each}), importance)
    with torch.no_grad():
        x = torch.cat([model.blocks[0].norm(model.embedding(batch)).flatten(0, 1) for batch in batches()])
    for name, calls in importance.items():
        weights = torch.cat(calls)
        torch.testing.assert_close(found[name], (x.T * weights) @ x / len(x), rtol=1e-4, atol=1e-5)


def test_a_share_of_the_shift_is_taken_back() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, before = torch.randn(5, 8, generator=generator), torch.randn(200, 8, generator=generator)
    after = before + 0.3 * torch.randn(200, 8, generator=generator)
    moments = after.T @ after / 200, before.T @ after / 200
    none, half, whole = (propagated_target(weight, *moments, strength) for strength in (0.0, 0.5, 1.0))
    torch.testing.assert_close(none, weight)
    torch.testing.assert_close(half, (none + whole) / 2)
    least = torch.linalg.lstsq(after.double(), before.double() @ weight.double().T).solution.T
    torch.testing.assert_close(whole.double(), least, rtol=0.02, atol=0.02)  # damped by 1 %


def test_the_scaling_of_lora_leaves_the_product_right() -> None:
    weights = []
    for config in (
        LoftQConfig(rank=4, block_size=16),
        LoftQConfig(rank=4, block_size=16, alpha=32),
        LoftQConfig(rank=4, block_size=16, alpha=3, rslora=True),
    ):
        model, _ = loftq_model(Model(), config)
        weights.append(model.blocks[0].up.weight)
        assert model.blocks[0].up.scaling == pytest.approx(config.scaling)
    assert LoftQConfig(rank=4, alpha=3, rslora=True).scaling == 1.5
    assert LoftQConfig(rank=4, alpha=32).scaling == 8
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0], rtol=1e-4, atol=1e-6)


def test_layers_do_not_depend_on_which_others_are_taken() -> None:
    config = LoftQConfig(rank=2, block_size=16, iterations=0)
    all_layers, _ = loftq_model(Model(), config)
    one, _ = loftq_model(
        Model(), LoftQConfig(rank=2, block_size=16, iterations=0, include=(r"blocks\.2\.up",))
    )
    assert torch.equal(all_layers.blocks[2].up.lora_A, one.blocks[2].up.lora_A)
    other, _ = loftq_model(Model(), LoftQConfig(rank=2, block_size=16, iterations=0, seed=1))
    assert not torch.equal(all_layers.blocks[2].up.lora_A, other.blocks[2].up.lora_A)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ([], "no calibration batch"),
        (torch.zeros(2, 5), r"one Tensor of shape \(2, 5\)"),
        ([torch.zeros(2, 5)], r"cannot be run on a calibration batch, a Tensor of shape \(2, 5\): "),
        ([{"words": 1}], "a dict: .*words"),
        (["words"], "a str: "),
    ],
)
def test_text_that_the_model_cannot_read_is_refused(text: Any, match: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(QuantError, match=match):
        loftq_model(model, LoftQConfig(rank=2), text)
    assert isinstance(model[0], nn.Linear)


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    with pytest.raises(QuantError, match="not symmetric"):
        InputNorm.of(torch.randn(8, 8))
