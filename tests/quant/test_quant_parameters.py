"""Parameters that are packed in place: what modules read is Q + scaling B A, whatever their code does with it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from quant import (
    LoftQConfig,
    PackedParameter,
    QuantError,
    QuantizedTensor,
    cache_dequantized,
    loftq,
    loftq_model,
    loftq_parameter_,
    pack_parameter_,
    quantize,
)
from quant.stack import loftq_stack


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Transposed(nn.Module):
    """GPT-2's Conv1D: the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(32, 48))
        self.bias = nn.Parameter(torch.zeros(48))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, input, self.weight)


class Experts(nn.Module):
    """A mixture's stack (experts, out, in), read once for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(drawn(3, 48, 32))
        self.down = nn.Parameter(drawn(3, 32, 48, seed=1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = [functional.linear(input, self.up[expert]).relu() for expert in range(3)]
        return sum(functional.linear(each, self.down[expert]) for expert, each in enumerate(hidden))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


def factors(*shape: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(*shape[:-2], rank, shape[-1], seed=5), drawn(*shape[:-1], rank, seed=6)


@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(48, 32), (3, 48, 32)])
def test_what_is_read_is_the_packed_weight_and_its_adapters(
    shape: tuple[int, ...], transposed: bool, scaling: float
) -> None:
    packed, (lora_A, lora_B) = quantize(drawn(*shape), "nf4", 16), factors(*shape)
    module = nn.Module()
    module.weight = nn.Parameter(packed.dequantize().mT if transposed else packed.dequantize())
    pack_parameter_(module, "weight", packed, lora_A, lora_B, scaling=scaling, transposed=transposed)
    product = np.einsum("...or,...ri->...oi", lora_B.double().numpy(), lora_A.double().numpy())
    expected = packed.dequantize(torch.float64) + scaling * torch.from_numpy(product)
    read = module.weight.mT if transposed else module.weight
    torch.testing.assert_close(read.double(), expected, rtol=1e-5, atol=1e-5)
    assert set(dict(module.named_parameters())) == {
        "parametrizations.weight.0.lora_A",
        "parametrizations.weight.0.lora_B",
    }


def test_a_transposed_weight_computes_and_learns_as_the_dense_one() -> None:
    layer, input = Transposed(), drawn(5, 32, seed=2).requires_grad_()
    packed, (lora_A, lora_B) = quantize(layer.weight.T, "nf4", 16), factors(48, 32)
    pack_parameter_(layer, "weight", packed, lora_A, lora_B, transposed=True)
    seen = drawn(5, 48, seed=3)
    layer(input).backward(seen)
    leaves = [each.clone().double().requires_grad_() for each in (lora_A, lora_B, input.detach())]
    expected = leaves[2] @ (packed.dequantize(torch.float64) + leaves[1] @ leaves[0]).T
    expected.backward(seen.double())
    weight = layer.parametrizations["weight"][0]
    for found, wanted in zip((weight.lora_A, weight.lora_B, input), leaves, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_stack_are_those_of_finite_differences() -> None:
    experts = Experts()
    pack_parameter_(experts, "up", quantize(experts.up, "nf4", 16), *factors(3, 48, 32))
    experts = experts.double()
    weight = experts.parametrizations["up"][0]
    input = drawn(4, 32, seed=9).double()
    names = ("lora_A", "lora_B")
    start = {f"parametrizations.up.0.{name}": getattr(weight, name).detach().double() for name in names}
    leaves = [each.requires_grad_() for each in start.values()]

    def run(*values: torch.Tensor) -> torch.Tensor:
        # sin: the ReLU in the module has kinks
        state = dict(zip(start, values, strict=True))
        return torch.func.functional_call(experts, state, (input,)).sin()

    assert torch.autograd.gradcheck(run, leaves, eps=1e-7, atol=1e-3, nondet_tol=1e-9)


def test_a_forward_dequantizes_once_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts()
    expected = Experts()
    packed = loftq_parameter_(experts, "up", "int8", rank=4, block_size=16)
    assert packed.name == "up"
    expected.up.data = experts.up.detach()
    calls = []
    original = QuantizedTensor.dequantize
    monkeypatch.setattr(
        QuantizedTensor, "dequantize", lambda self, *rest: calls.append(1) or original(self, *rest)
    )
    input = drawn(5, 32, seed=2)
    torch.testing.assert_close(experts(input), expected(input))
    assert len(calls) == 1
    parameter = experts.parametrizations["up"][0]
    assert not parameter._kept
    with pytest.raises(RuntimeError):
        experts(drawn(5, 7))
    assert not parameter._kept
    assert not parameter._running
    with cache_dequantized(experts):
        experts(input)
        experts(input)
    assert len(calls) == 3


def test_it_learns_under_checkpointing_and_after_a_look_without_gradients() -> None:
    experts, other = Experts(), Experts()
    for each in (experts, other):
        loftq_parameter_(each, "up", "nf4", rank=4, block_size=16)
    input = drawn(5, 32, seed=2)
    with torch.no_grad():
        experts(input)
    experts(input).sum().backward()
    checkpoint(other, input.requires_grad_(), use_reentrant=False).sum().backward()
    for name, parameter in experts.named_parameters():
        gradient = dict(other.named_parameters())[name].grad
        torch.testing.assert_close(parameter.grad, gradient)
        assert float(gradient.abs().sum()) > 0


def test_a_look_without_gradients_inside_the_forward_does_not_stop_learning() -> None:
    class Looking(Transposed):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                size = self.weight.norm()
            return super().forward(input) / size

    layer = Looking()
    loftq_parameter_(layer, "weight", "nf4", 4, 1, 16, transposed=True)
    layer(drawn(5, 32)).sum().backward()
    assert float(layer.parametrizations["weight"][0].lora_B.grad.abs().sum()) > 0


@pytest.mark.parametrize("transposed", [False, True])
def test_each_matrix_of_a_stack_is_its_own_loftq(transposed: bool) -> None:
    module = nn.Module()
    weight = drawn(3, 48, 32)
    module.weight = nn.Parameter(weight.mT.contiguous() if transposed else weight)
    report = loftq_parameter_(module, "weight", "nf4", 4, 3, 16, transposed=transposed)
    errors = []
    for read, matrix in zip(module.weight.mT if transposed else module.weight, weight, strict=True):
        result = loftq(matrix, "nf4", 4, 3, 16)
        expected = result.quantized.dequantize() + result.lora_B @ result.lora_A
        torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-5)
        errors.append(result.errors)
    np.testing.assert_allclose(report.errors, np.sqrt(np.mean(np.square(errors), axis=0)))
    assert report.bytes_before == weight.nbytes
    packed = module.parametrizations["weight"][0]
    assert report.bytes_after == sum(part.nbytes for part in (*packed.buffers(), *packed.parameters()))


def test_a_stack_is_what_quantizing_it_whole_would_store() -> None:
    weight = drawn(3, 48, 32)
    for storage in ("float32", "float16"):
        result = loftq_stack(weight, "uint3", 4, 0, 16, scale_storage=storage)
        whole = quantize(weight, "uint3", 16, scale_storage=storage)
        assert all(torch.equal(part, whole.parts()[key]) for key, part in result.quantized.parts().items())


def test_covariances_may_differ_by_matrix() -> None:
    weight, factor = drawn(2, 16, 32), drawn(2, 32, 32, seed=4)
    covariance = factor @ factor.mT
    result = loftq_stack(weight, "nf4", 2, 2, 16, covariance=covariance)
    for index in range(2):
        alone = loftq(weight[index], "nf4", 2, 2, 16, covariance=covariance[index])
        torch.testing.assert_close(result.lora_B[index] @ result.lora_A[index], alone.lora_B @ alone.lora_A)


def test_stacks_that_cannot_be_one_tensor_are_refused() -> None:
    with pytest.raises(QuantError, match="divides 35"):
        loftq_stack(drawn(2, 5, 7), "nf4", 2, 0, 16)
    with pytest.raises(QuantError, match="quantized twice"):
        loftq_stack(drawn(2, 4, 16), "nf4", 2, 0, 16, scale_storage="double")
    with pytest.raises(QuantError, match="no matrix and no stack"):
        loftq_stack(drawn(4), "nf4")


def test_a_state_dict_holds_everything_bit_for_bit(tmp_path) -> None:
    experts, other = Experts(), Experts()
    for seed, each in enumerate((experts, other)):
        for name in ("up", "down"):
            loftq_parameter_(each, name, "nf4", 4, 1, 16, seed=seed)
    other.parametrizations["up"][0].codes.zero_()
    save_file(experts.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert list(experts.state_dict()) == [
        f"parametrizations.{name}.0.{part}"
        for name in ("up", "down")
        for part in ("lora_A", "lora_B", "codes", "absmax", "_extra_state")
    ]
    assert torch.equal(experts(drawn(5, 32)), other(drawn(5, 32)))


def test_tied_parameters_stay_tied() -> None:
    model = Tied()
    weight = model.embedding.weight.detach().clone()
    pack_parameter_(model, "head.weight", quantize(weight, "nf4", 16), *factors(20, 32))
    shared = model.embedding.parametrizations["weight"][0]
    assert model.head.parametrizations["weight"][0] is shared
    model(torch.arange(4)).sum().backward()
    assert shared.lora_A.grad is not None
    clone = copy.deepcopy(model).half()
    assert clone.head.parametrizations["weight"][0] is clone.embedding.parametrizations["weight"][0]
    assert clone.embedding.parametrizations["weight"][0] is not shared
    shared.codes.zero_()
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert not torch.equal(clone.head.weight.float(), model.head.weight)


def test_casts_reach_what_is_read_but_not_the_scales() -> None:
    layer = Transposed()
    packed = quantize(layer.weight.T, "nf4", 16)
    pack_parameter_(layer, "weight", packed, transposed=True)
    half = Transposed().half()
    pack_parameter_(half, "weight", packed, transposed=True)
    assert half.weight.dtype == torch.float16
    layer = layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.parametrizations["weight"][0].absmax.dtype == torch.float32
    assert torch.equal(layer.weight, packed.dequantize(torch.bfloat16).T)
    assert layer(drawn(2, 32).bfloat16()).dtype == torch.bfloat16


def test_a_copy_runs_on_its_own() -> None:
    experts = Experts()
    loftq_parameter_(experts, "up", "nf4", 4, 1, 16)
    clone = copy.deepcopy(experts)
    with torch.no_grad():
        clone.parametrizations["up"][0].lora_B.zero_()
    assert not torch.equal(clone(drawn(5, 32)), experts(drawn(5, 32)))
    assert not clone.parametrizations["up"][0]._running
    assert not experts.parametrizations["up"][0]._running


def test_a_model_on_the_meta_device_takes_packed_parameters() -> None:
    loaded = Experts()
    with torch.device("meta"):
        model = Experts()
    with pytest.raises(QuantError, match=r"up of shape \(3, 48, 32\) is on the meta device"):
        loftq_parameter_(model, "up", block_size=16)
    for name in ("up", "down"):
        pack_parameter_(model, name, quantize(getattr(loaded, name), "nf4", 16))
        pack_parameter_(loaded, name, quantize(getattr(loaded, name), "nf4", 16))
    assert torch.equal(model(drawn(5, 32)), loaded(drawn(5, 32)))


def test_linear_layers_on_the_meta_device_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(QuantError, match=r"^0.* is on the meta device"):
        loftq_model(model, LoftQConfig())


def test_wrong_names_shapes_and_factors_are_refused() -> None:
    experts, packed = Experts(), quantize(drawn(3, 48, 32), "nf4", 16)
    pack_parameter_(experts, "up", packed)
    for name in ("up", "nothing", "some.where"):
        with pytest.raises(QuantError, match=f"{name} is no parameter of this"):
            pack_parameter_(experts, name, packed)
    with pytest.raises(QuantError, match=r"down has the shape \(3, 32, 48\)"):
        pack_parameter_(experts, "down", packed)
    pack_parameter_(experts, "down", packed, transposed=True)
    lora_A, lora_B = factors(3, 48, 32)
    for wrong in ((lora_A, None), (None, lora_B), (lora_A[0], lora_B[0]), (lora_B, lora_A)):
        with pytest.raises(QuantError, match="factors"):
            PackedParameter(packed, *wrong)
    with pytest.raises(QuantError, match="is not that of a PackedParameter"):
        PackedParameter(quantize(drawn(2, 2, 4, 16), "nf4", 16))


def test_a_vector_can_be_packed_too() -> None:
    layer = nn.LayerNorm(64)
    pack_parameter_(layer, "weight", quantize(drawn(64), "int8"))
    torch.testing.assert_close(layer.weight, drawn(64), rtol=0.05, atol=0.05)
