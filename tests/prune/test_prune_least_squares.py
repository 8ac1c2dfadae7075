from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama, traced

from graphprune.errors import TrainingError
from graphprune.prune.repair.activations import Calibration
from graphprune.prune.repair.least_squares import LeastSquares, Prediction, predict
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
    repair = LeastSquares(own.model, gates, Calibration.of_windows(IDS, 4, run(own.model)))
    close(gates, [0])
    with torch.no_grad():
        masked = run(own.model)(IDS).logits
        repair.update(mask_of(gates))
        repaired = run(own.model)(IDS).logits
    assert not torch.allclose(masked, repaired, atol=1e-3)
    gates.close()
    before = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    plan = Plan({name: [0] for name in names})
    small = repair.cut(plan, lambda: shrink(own.model, own.groups, plan, own.inputs))
    assert all(torch.equal(before[name], tensor) for name, tensor in own.model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(run(small)(IDS).logits, repaired, atol=1e-4, rtol=1e-4)


def brute_force(fit: np.ndarray, held: np.ndarray, gone: list[int]) -> tuple[float, np.ndarray]:
    """Return the ridge that errs least on held-out rows, residual by residual, and C of all rows with it."""
    kept = [i for i in range(fit.shape[1]) if i not in gone]

    def regression(x: np.ndarray, share: float) -> np.ndarray:
        scale = np.mean(np.square(x[:, kept]).sum(0))
        # Ridge regression is least squares with a row of √λ for each coefficient below the data.
        rows = np.vstack([x[:, kept], np.sqrt(share * scale) * np.eye(len(kept))])
        return np.linalg.lstsq(rows, np.vstack([x[:, gone], np.zeros((len(kept), len(gone)))]), rcond=None)[0]

    errors = {
        share: np.square(held[:, gone] - held[:, kept] @ regression(fit, share)).sum()
        for share in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    }
    best = min(errors, key=errors.__getitem__)
    return best, regression(np.vstack([fit, held]), best).T


def test_the_ridge_is_the_one_that_errs_least_on_held_out_tokens():
    """Against regressions on the activations themselves, in float64; noise decides which ridge is best."""
    generator = np.random.default_rng(0)
    chosen = set()
    for noise in (1e-3, 0.1, 1.0, 3.0, 10.0, 30.0):
        mixing = generator.normal(size=(8, 8))
        signal = generator.normal(size=(60, 8)) @ mixing
        x = signal + noise * generator.normal(size=(60, 8))
        fit, held = x[:40], x[40:]
        best, coefficients = brute_force(fit, held, [2, 5])
        chosen.add(best)
        gone = torch.zeros(8, dtype=torch.bool)
        gone[[2, 5]] = True
        found = predict(*(torch.from_numpy(part.T @ part).float() for part in (fit, held)), gone)
        np.testing.assert_allclose(found.coefficients.double().numpy(), coefficients, rtol=1e-3, atol=1e-4)
    assert len(chosen) >= 3


def test_every_fourth_window_is_held_out_and_the_fit_is_of_activations(own):
    """Against regressions in float64 on activations recorded by the test's own hook."""
    name = own.of_kind("ffn")[0]
    gates = Gates(own.model, own.groups, [name])
    layer = own.model.base_model.model.model.layers[0].mlp.down_proj
    windows = {}
    for part, rows in (("fit", [0, 2, 3, 4, 6, 7]), ("held", [1, 5])):
        seen = []
        handle = layer.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].flatten(0, -2).double())
        )
        with torch.no_grad():
            run(own.model)(IDS[rows])
        handle.remove()
        windows[part] = torch.cat(seen).numpy()
    repair = LeastSquares(own.model, gates, Calibration.of_windows(IDS, 4, run(own.model)))
    close(gates, [3, 5, 40])
    repair.update(mask_of(gates))
    (prediction,) = gates.stand_ins.values()
    _, expected = brute_force(windows["fit"], windows["held"], [3, 5, 40])
    assert prediction.gone.tolist() == [3, 5, 40]
    np.testing.assert_allclose(prediction.coefficients.numpy(), expected, atol=1e-3, rtol=1e-3)


def test_a_ridge_needs_a_window_to_be_chosen_on(own):
    gates = Gates(own.model, own.groups, own.of_kind("ffn"))
    with pytest.raises(TrainingError, match="but one window"):
        LeastSquares(own.model, gates, Calibration.of_windows(IDS[:1], 4, run(own.model)))


def test_moments_without_a_cholesky_factor_leave_a_larger_ridge():
    """In float32 the moments of activations with one giant direction are not positive definite at 1e-4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 300, generator=generator) * 1e-3
    x += 3000 * torch.randn(4000, 1, generator=generator)
    gone = torch.arange(300) < 3
    found = predict(x[:3000].T @ x[:3000], x[3000:].T @ x[3000:], gone)
    error = x[:, gone] - x[:, ~gone] @ found.coefficients.T
    assert float(error.norm() / x[:, gone].norm()) < 0.05
    with pytest.raises(TrainingError, match="not finite"):
        predict(torch.full((4, 4), float("nan")), torch.eye(4), torch.arange(4) < 1)


def test_a_unit_that_is_a_copy_is_replaced_without_loss(own):
    """Channel 1 computes what channel 0 computes: removing it changes almost nothing once repaired."""
    mlp = own.model.base_model.model.model.layers[0].mlp
    with torch.no_grad():
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.base_layer.weight[1] = layer.base_layer.weight[0]
            layer.lora_B["default"].weight[1] = layer.lora_B["default"].weight[0]
        mlp.down_proj.base_layer.weight[:, 1] *= 30
    gates = Gates(own.model, own.groups, own.of_kind("ffn")[:1])
    repair = LeastSquares(own.model, gates, Calibration.of_windows(IDS, 4, run(own.model)))
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
