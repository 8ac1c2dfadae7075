"""Blocks trained for what the dense ones put out: what is trained, what stays, and that it is never worse."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_quant_calibrated import Interrupted, Model, Parallel, Straight
from torch import Tensor, nn

import quant
from quant import LoftQConfig, QuantError, QuantLinear, Reconstruction, loftq_model
from quant.chain import BlockCall
from quant.live import LiveLinear
from quant.reconstruction import reconstruct_block_

FORMATS = ("uint2", "uint3", "uint4", "int2", "int4", "nf2", "nf4", "fp4")
SETTINGS = {"format": "uint2", "rank": 2, "iterations": 2, "block_size": 16}


def packed_layer(
    format: str, rows: int, columns: int, seed: int, storage: str = "float32"
) -> tuple[QuantLinear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator)
    found = quant.loftq(dense, format, rank=1, iterations=1, block_size=16, scale_storage=storage)
    layer = QuantLinear.from_parts(
        found.quantized, torch.randn(rows, generator=generator), found.lora_A, found.lora_B, 2.0
    )
    return layer, dense


def network() -> nn.Module:
    """Return a model whose hidden states fill their space, so that no closed form leaves blocks all but exact."""
    model = Model().eval()
    generator = torch.Generator().manual_seed(3)
    model.embedding = nn.Embedding.from_pretrained(0.3 * torch.randn(500, 32, generator=generator))
    return model


def batches(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 500, (4, 24), generator=generator) for _ in range(count)]


def outputs(model: nn.Module) -> list[Tensor]:
    """Return what the last block puts out."""
    seen: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with torch.no_grad():
        for batch in batches(46):
            model(batch)
    handle.remove()
    return seen


def error(model: nn.Module, dense: nn.Module) -> float:
    """Return the relative error of what the last block puts out, on texts that were not trained on."""
    pairs = list(zip(outputs(model), outputs(dense), strict=True))[40:]
    difference = torch.cat(
        [(ours - theirs).square().sum(-1) / theirs.square().sum(-1) for ours, theirs in pairs]
    )
    return float(difference.mean())


@given(
    st.sampled_from(FORMATS),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 99),
    st.sampled_from(["float32", "float16"]),  # storing "double" anew is a rounding of its own
)
def test_a_live_layer_starts_as_the_packed_one_and_packs_to_it(format, rows, columns, seed, storage):
    layer, dense = packed_layer(format, rows, columns, seed, storage)
    live = LiveLinear(layer)
    inputs = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(live(inputs), layer(inputs), rtol=1e-5, atol=1e-5)
    before, after = layer.quantized, live.packed().quantized
    torch.testing.assert_close(after.dequantize(), before.dequantize(), rtol=1e-6, atol=1e-6)
    scale = before.absmax.repeat_interleave(16)[: dense.numel()].view(dense.shape)
    offset = torch.zeros(()) if before.offsets is None else before.offsets.values().abs().max()
    told_apart = scale.abs() > 1e-4 * offset  # of a constant block all codes mean the same
    assert torch.equal(after.unpacked_codes()[told_apart], before.unpacked_codes()[told_apart])


@given(st.sampled_from(FORMATS), st.integers(0, 99))
def test_gradients_pass_straight_through_the_rounding_within_the_levels(format, seed):
    layer, _ = packed_layer(format, 6, 32, seed)
    generator = torch.Generator().manual_seed(seed)
    live = LiveLinear(layer).double()
    with torch.no_grad():  # some leave the range of the levels
        live.latent += 0.5 * torch.randn(live.latent.shape, generator=generator)
    layer.double()
    inputs, wanted = (torch.randn(5, width, generator=generator).double() for width in (32, 6))
    (live(inputs) * wanted).sum().backward()

    # By the chain rule, written out: the weight's gradient, and what a level, a scale and an offset have of it.
    weight = (wanted.T @ inputs).view(-1, 16)
    levels = live.format.levels.double()
    nearest = levels[(live.latent.detach().clamp(-1, 1)[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(
        live.latent.grad, weight * live.scale.detach() * (live.latent.detach().abs() <= 1)
    )
    torch.testing.assert_close(live.scale.grad, (weight * nearest).sum(1, keepdim=True))
    if live.offset is not None:
        torch.testing.assert_close(live.offset.grad, weight.sum(1, keepdim=True))


@pytest.mark.parametrize(("format", "storage"), [("uint2", "double"), ("nf2", "float32"), ("nf4", "double")])
def test_it_comes_nearer_to_the_dense_model_on_other_texts_too(format, storage):
    dense, texts = network(), batches(40)
    settings = {"format": format, "rank": 2, "iterations": 2, "block_size": 16, "scale_storage": storage}
    before, _ = loftq_model(copy.deepcopy(dense), LoftQConfig(**settings), texts)
    trained = LoftQConfig(**settings, reconstruction=Reconstruction(epochs=5, code_rate=0.003))
    after, reports = loftq_model(copy.deepcopy(dense), trained, texts)
    assert error(after, dense) < 0.9 * error(before, dense)
    inside = [report for report in reports if report.name.startswith("blocks.")]
    assert len(inside) == 9
    for report in inside:
        assert report.block_errors is not None
        assert report.block_errors[1] < report.block_errors[0]
    assert [report.block_errors for report in reports if report.name == "head"] == [None]
    assert {name: (layer.format, layer.quantized.nbytes) for name, layer in packed(after).items()} == {
        name: (layer.format, layer.quantized.nbytes) for name, layer in packed(before).items()
    }


def packed(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "settings",
    [
        Reconstruction(code_rate=0, scale_rate=0, adapter_rate=0),
        Reconstruction(code_rate=1e3, scale_rate=1e3, adapter_rate=1e3),
    ],
    ids=["nothing is trained", "training leads astray"],
)
def test_what_comes_no_nearer_leaves_every_bit(settings):
    before, _ = loftq_model(network(), LoftQConfig(**SETTINGS), batches())
    after, reports = loftq_model(network(), LoftQConfig(**SETTINGS, reconstruction=settings), batches())
    for name, value in state(before).items():
        assert torch.equal(value, after.state_dict()[name]), name
    assert all(
        report.block_errors[0] == report.block_errors[1] for report in reports if "blocks" in report.name
    )


def test_all_else_is_frozen_and_one_seed_gives_one_result():
    settings = LoftQConfig(**SETTINGS, reconstruction=Reconstruction(epochs=3))
    dense = network()
    first, _ = loftq_model(copy.deepcopy(dense), settings, batches())
    second, _ = loftq_model(copy.deepcopy(dense), settings, batches())
    for name, value in state(first).items():
        assert torch.equal(value, second.state_dict()[name]), name
    for name, parameter in first.named_parameters():
        assert parameter.grad is None, name
        if "norm" in name or "embedding" in name:
            assert torch.equal(parameter, dense.get_parameter(name)), name
    for layer in packed(first).values():
        assert layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad


def test_errors_are_those_of_the_blocks_outputs():
    dense = network()
    config = LoftQConfig(**SETTINGS, exclude=("head",), reconstruction=Reconstruction(epochs=3))
    model, reports = loftq_model(copy.deepcopy(dense), config, batches())
    difference = [
        (ours - theirs).double().square().sum(-1) / theirs.double().square().sum(-1)
        for ours, theirs in list(zip(outputs(model), outputs(dense), strict=True))[:6]
    ]
    found = next(report.block_errors for report in reports if report.name == "blocks.2.up")
    assert found is not None
    assert found[1] == pytest.approx(float(torch.cat(difference).mean()), rel=1e-4)


def test_bfloat16_models_are_reconstructed():
    dense = network().to(torch.bfloat16)
    config = LoftQConfig(
        **SETTINGS, exclude=("head",), reconstruction=Reconstruction(epochs=20, code_rate=0.003)
    )
    model, reports = loftq_model(copy.deepcopy(dense), config, batches())
    assert all(report.block_errors[1] < report.block_errors[0] for report in reports)
    assert outputs(model)[0].dtype == torch.bfloat16


def test_it_survives_a_file(tmp_path):
    config = LoftQConfig(**SETTINGS, reconstruction=Reconstruction(epochs=2))
    model, _ = loftq_model(network(), config, batches())
    quant.save_quantized(model, tmp_path)
    again = network()
    quant.load_quantized_(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(again), strict=True))


@pytest.mark.parametrize("kind", [Parallel, Interrupted, Straight])
def test_a_model_without_a_chain_is_refused_untouched(kind):
    model = kind().eval()
    texts = [batch % 40 for batch in batches()]
    before = state(model)
    with pytest.raises(QuantError, match="no block can be reconstructed"):
        loftq_model(model, LoftQConfig(**SETTINGS, reconstruction=Reconstruction()), texts)
    assert before.keys() == model.state_dict().keys()
    assert not packed(model)


def test_it_needs_text_and_sensible_numbers():
    with pytest.raises(QuantError, match="without calibration batches"):
        loftq_model(network(), LoftQConfig(**SETTINGS, reconstruction=Reconstruction()))
    for settings in ({"epochs": 0}, {"epochs": 1.5}, {"code_rate": -1.0}, {"adapter_rate": float("nan")}):
        with pytest.raises(QuantError, match="not possible"):
            Reconstruction(**settings)


def test_a_block_without_packed_layers_stays():
    block = network().blocks[0]
    hidden = torch.randn(2, 4, 32)
    call = BlockCall((), {"scale": 2.0}, None)
    target = call.run(block, hidden)
    found = reconstruct_block_(block, [call], [hidden], [target], Reconstruction())
    assert torch.equal(found.outputs[0], target)
    assert (found.before, found.after) == (0.0, 0.0)
