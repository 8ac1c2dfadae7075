from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama, traced

from graphprune.prune.repair import RIDGE, Prediction, Repair
from graphprune.saliency.gates import Gates
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.source.adapters import attach_adapters

IDS = torch.arange(96).reshape(8, 12) % 60 + 3


@pytest.fixture
def own():
    model = attach_adapters(tiny_llama(seed=6), rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return traced(model)


def run(model):
    return lambda ids: model(input_ids=ids, use_cache=False)


def close(gates, units):
    for value in gates.values.values():
        value.data[units] = 0


def mask_of(gates):
    return lambda name: gates.values[name].detach() == 0


@pytest.mark.parametrize("kind", ["ffn", "attention_heads", "query_heads"])
def test_cutting_the_folded_weights_is_the_repaired_model(own, kind):
    """What the stand-ins compute with gates shut is what the smaller model computes."""
    names = own.of_kind(kind)
    gates = Gates(own.model, own.groups, names)
    repair = Repair(own.model, gates, IDS.split(4), run(own.model))
    close(gates, [0])
    with torch.no_grad():
        masked = run(own.model)(IDS).logits
        repair.update(mask_of(gates))
        repaired = run(own.model)(IDS).logits
    assert not torch.allclose(masked, repaired, atol=1e-3)
    gates.close()
    before = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    with repair.folded():
        small = shrink(own.model, own.groups, Plan({name: [0] for name in names}), own.inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in own.model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(run(small)(IDS).logits, repaired, atol=1e-4, rtol=1e-4)


def test_coefficients_are_ridge_regression_on_the_activations(own):
    """Against the normal equations in float64, on activations recorded by the test's own hook."""
    name = own.of_kind("ffn")[0]
    gates = Gates(own.model, own.groups, [name])
    seen = []
    layer = own.model.base_model.model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2).double())
    )
    repair = Repair(own.model, gates, IDS.split(4), run(own.model))
    handle.remove()
    close(gates, [3, 5, 40])
    repair.update(mask_of(gates))
    (prediction,) = gates.stand_ins.values()
    x = torch.cat(seen).detach()
    kept = [i for i in range(48) if i not in (3, 5, 40)]
    inner = x[:, kept].T @ x[:, kept]
    inner += RIDGE * inner.diagonal().mean() * torch.eye(45, dtype=torch.float64)
    expected = torch.linalg.solve(inner, x[:, kept].T @ x[:, [3, 5, 40]]).T
    assert prediction.gone.tolist() == [3, 5, 40]
    torch.testing.assert_close(prediction.coefficients.double(), expected, atol=1e-3, rtol=1e-3)


def test_a_unit_that_is_a_copy_is_replaced_without_loss(own):
    """Channel 1 computes what channel 0 computes: removing it changes almost nothing once repaired."""
    mlp = own.model.base_model.model.model.layers[0].mlp
    with torch.no_grad():
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.base_layer.weight[1] = layer.base_layer.weight[0]
            layer.lora_B["default"].weight[1] = layer.lora_B["default"].weight[0]
        mlp.down_proj.base_layer.weight[:, 1] *= 30
    gates = Gates(own.model, own.groups, own.of_kind("ffn")[:1])
    repair = Repair(own.model, gates, IDS.split(4), run(own.model))
    with torch.no_grad(), gates.opened():
        dense = run(own.model)(IDS).logits
    close(gates, [1])
    with torch.no_grad():
        masked = run(own.model)(IDS).logits
        repair.update(mask_of(gates))
        repaired = run(own.model)(IDS).logits
    assert float((repaired - dense).norm()) < 0.2 * float((masked - dense).norm())


def test_open_gates_stay_open_whatever_stands_in(own):
    gates = Gates(own.model, own.groups, own.of_kind("ffn"))
    with torch.no_grad():
        before = run(own.model)(IDS).logits
        gates.stand_ins = {c.source: lambda x: torch.full_like(x, 1e6) for c in gates.consumers}
        assert torch.equal(run(own.model)(IDS).logits, before)


@pytest.mark.parametrize("axis", [0, 1])
def test_folding_is_predicting_first(axis):
    generator = torch.Generator().manual_seed(0)
    prediction = Prediction(
        torch.tensor([1, 4]), torch.tensor([0, 2, 3]), torch.randn(2, 3, generator=generator)
    )
    weight = torch.randn(5, 7, generator=generator) if axis == 0 else torch.randn(7, 5, generator=generator)
    x = torch.randn(6, 5, generator=generator)
    with_predictions = x.clone()
    with_predictions[:, [1, 4]] = x[:, [0, 2, 3]] @ prediction.coefficients.T
    matrix = weight if axis == 0 else weight.T
    folded = prediction.fold(weight, axis)
    folded = folded if axis == 0 else folded.T
    torch.testing.assert_close(x @ folded, with_predictions @ matrix)
    assert bool((folded[[1, 4]] == 0).all())
