"""LoftQ guided by a loss: what each token counts, against autograd; that it serves the loss, and mixes by it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant import (
    InputNorm,
    LoftQConfig,
    QuantError,
    collect_covariances,
    loftq_model,
    mix_for_budget,
    quantize,
)
from quant.guidance import LARGEST, token_importance

NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(hidden)))


class Model(nn.Module):
    """Two blocks and a head; returns the loss of the rows whose label is not negative."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = rows
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        return {"logits": logits, "loss": functional.cross_entropy(logits, labels, ignore_index=-1)}


def loss(output: dict[str, Tensor]) -> Tensor:
    return output["loss"]


def batches(count: int = 4, ignored: float = 0.0, seed: int = 1) -> list[dict[str, Tensor]]:
    """Rows of two kinds that lie in different directions; of the second kind a share has no label."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        rows = torch.randn(60, 32, generator=generator)
        labels = torch.randint(0, 10, (60,), generator=generator)
        rows[:30, :16] *= 0.1
        rows[30:, 16:] *= 0.1
        rows[30:] *= 3
        labels[30:][torch.rand(30, generator=generator) < ignored] = -1
        found.append({"rows": rows, "labels": labels})
    return found


def test_importance_is_the_mean_square_of_the_gradient() -> None:
    model = Model().eval()
    found = token_importance(model, batches(), NAMES, loss)
    assert all(parameter.grad is None for parameter in model.parameters())
    reference = copy.deepcopy(model).double()
    for name in NAMES:
        squares = []
        for batch in batches():
            _, gradient = watched(reference, name, {**batch, "rows": batch["rows"].double()})
            squares.append(gradient.square().mean(dim=-1))
        scale = torch.cat(squares).mean()
        assert found[name].scale == pytest.approx(float(scale), rel=1e-4)
        for rows, expected in zip(found[name].calls, squares, strict=True):
            torch.testing.assert_close(rows.double(), expected / scale, rtol=1e-3, atol=1e-5)


def test_rows_without_a_label_count_nothing_and_frozen_models_are_measured_too() -> None:
    many = [
        {"rows": torch.randn(400, 32), "labels": torch.where(torch.arange(400) == 7, 3, -1)} for _ in range(2)
    ]
    rows = torch.cat(token_importance(Model(), many, NAMES, loss)["blocks.1.down"].calls)
    assert rows.mean() == pytest.approx(1, rel=1e-4)
    # Two rows of 800 have a label: each would count 400.
    assert (rows > 0).sum() == 2
    frozen = Model().requires_grad_(False)
    assert token_importance(frozen, many, NAMES, loss).keys() == set(NAMES)


def test_a_row_with_a_far_larger_gradient_is_clipped() -> None:
    batch = {"rows": torch.randn(400, 32), "labels": torch.zeros(400, dtype=torch.long)}

    def steep(output: dict[str, Tensor]) -> Tensor:
        return output["logits"].sum() + 1000 * output["logits"][7].sum()

    found = token_importance(Model(), [batch], ["head"], steep)["head"]
    squares = torch.ones(400, dtype=torch.float64)
    squares[7] = 1001**2
    assert found.scale == pytest.approx(float(squares.mean()), rel=1e-5)
    clipped = squares.clamp(max=LARGEST * float(squares.mean()))
    assert clipped[7] < squares[7]
    torch.testing.assert_close(found.calls[0].double(), clipped / clipped.mean(), rtol=1e-4, atol=1e-7)


def test_covariances_count_each_row_by_its_importance() -> None:
    model = Model().eval()
    weights = [torch.rand(60, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = collect_covariances(model, batches(), ["blocks.0.up"], {"blocks.0.up": weights})
    x, w = torch.cat([batch["rows"] for batch in batches()]).double(), torch.cat(weights).double()
    torch.testing.assert_close(found["blocks.0.up"].double(), (x.T * w) @ x / len(x), rtol=1e-5, atol=1e-6)


def watched(model: nn.Module, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a layer's inputs, and the loss's gradient at its outputs, by a hook and autograd."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    value = model(**batch)["loss"]
    hook.remove()
    return seen[0][0].detach(), torch.autograd.grad(value, seen[0][1])[0]


def rise(model: Any, before: Any, text: list[dict[str, Tensor]]) -> float:
    """Divergence of the outputs from those before, on the rows that have a label."""
    total = 0.0
    with torch.no_grad():
        for batch in text:
            kept = batch["labels"] >= 0
            now, then = (m(**batch)["logits"][kept].log_softmax(-1) for m in (model, before))
            total += float(functional.kl_div(now, then, log_target=True, reduction="batchmean"))
    return total / len(text)


@pytest.mark.parametrize("interrupted", [False, True])
def test_errors_go_where_the_loss_does_not_mind_them(interrupted: bool) -> None:
    """Rows without a label count nothing, so that the others keep more of what they had."""
    dense = Model().eval()
    if interrupted:  # no chain of blocks: one run of the dense model measures all layers
        dense.blocks[0].register_forward_hook(lambda _, __, out: torch.tanh(out))
        dense.blocks[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
    config = LoftQConfig(format=2, rank=2, block_size=16, iterations=2, exclude=("head",))
    found = {}
    for name, given in (("alike", None), ("guided", loss)):
        small, _ = loftq_model(copy.deepcopy(dense), config, batches(8, ignored=1.0), loss=given)
        found[name] = rise(small, dense, batches(8, ignored=1.0, seed=5))
    assert found["guided"] < 0.8 * found["alike"]


def test_a_layer_that_the_loss_does_not_mind_takes_the_fewest_bits() -> None:
    model = Model().eval()
    with torch.no_grad():
        model.head.weight.mul_(3)
        model.blocks[0].down.weight.mul_(1e-3)  # what its up projection puts out hardly matters
    config = LoftQConfig(rank=2, iterations=1, block_size=16, exclude=("head",))
    formats = ["nf2", "nf4"]
    least, most = (mix_for_budget(model, config, 10**6, [format]).nbytes for format in formats)
    mix = mix_for_budget(model, config, (least + most) // 2, formats, batches(), loss=loss)
    assert {name: choice.format for name, choice in mix.chosen.items()} == {
        "blocks.0.up": "nf2",
        "blocks.0.down": "nf2",
        "blocks.1.up": "nf4",
        "blocks.1.down": "nf4",
    }
    unguided = mix_for_budget(model, config, (least + most) // 2, formats, batches())
    assert unguided.chosen["blocks.0.up"].format == "nf4"


def test_the_mix_says_what_a_layers_error_costs_the_loss() -> None:
    """Its error's share of the second-order estimate of leaving it out, summed row by row."""
    model = Model().eval()
    config = LoftQConfig(rank=2, iterations=0, block_size=16, include=("blocks",), compensated=False)
    mix = mix_for_budget(model, config, 10**6, ["uint2"], batches(), loss=loss)
    for name, choice in mix.chosen.items():
        layer, total, weighted = model.get_submodule(name), 0.0, torch.zeros(1)
        for batch in batches():
            inputs, gradients = watched(model, name, batch)
            gradient = gradients.square().mean(dim=-1)
            total += float((gradient * (inputs @ layer.weight.T).square().sum(dim=-1)).sum())
            weighted = weighted + (inputs.T * gradient) @ inputs
        norm = InputNorm.of(weighted / weighted.diagonal().mean())
        error = norm.error(layer.weight - quantize(layer.weight, "uint2", 16).dequantize())
        expected = total * (error / norm.error(layer.weight.detach())) ** 2
        assert choice.loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "given", "match"),
    [
        (None, loss, "without calibration batches"),
        (batches(), lambda output: output["logits"], "without a gradient"),
        (batches(), lambda output: 1.0, "float without a gradient"),
        (batches(), lambda output: output["loss"].detach(), "without a gradient"),
        (batches(), lambda output: output["loss"] * torch.nan, "is nan"),
    ],
)
def test_a_loss_that_is_none_is_refused(text: Any, given: Any, match: str) -> None:
    model = Model()
    with pytest.raises(QuantError, match=match):
        loftq_model(model, LoftQConfig(rank=2, block_size=16), text, loss=given)
    assert isinstance(model.blocks[0].up, nn.Linear)
