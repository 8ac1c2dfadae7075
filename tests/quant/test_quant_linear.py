"""QuantLinear against a dense linear layer plus LoRA in float64, and what must hold of the packed storage."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from quant import (
    QuantEmbedding,
    QuantError,
    QuantizedTensor,
    QuantLinear,
    cache_dequantized,
    format_names,
    linear,
    quantize,
)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(format: str = "nf4", scaling: float = 1.0, bias: bool = True, rank: int = 3) -> QuantLinear:
    factors = (drawn(rank, 40, seed=1), drawn(24, rank, seed=2)) if rank else (None, None)
    return QuantLinear.from_parts(
        quantize(drawn(24, 40), format, 16), drawn(24, seed=3) if bias else None, *factors, scaling=scaling
    )


def dense_output(layer: QuantLinear, input: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The layer's formula in float64 on leaves of its own: output, and [A, B]."""
    weight = layer.quantized.dequantize(torch.float64)
    factors = [factor.detach().double().requires_grad_() for factor in (layer.lora_A, layer.lora_B)]
    output = functional.linear(input, weight, None if layer.bias is None else layer.bias.double())
    return output + layer.scaling * (input @ factors[0].T) @ factors[1].T, factors


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("format", format_names())
def test_output_and_gradients_are_the_dense_layers(format: str, scaling: float, cached: bool) -> None:
    layer = make(format, scaling)
    input = drawn(2, 5, 40, seed=4).requires_grad_()
    seen = drawn(2, 5, 24, seed=5)
    with cache_dequantized(layer if cached else nn.Identity()):
        output = layer(input)
        output.backward(seen)
    reference_input = input.detach().double().requires_grad_()
    expected, factors = dense_output(layer, reference_input)
    expected.backward(seen.double())
    for found, wanted in [
        (output, expected),
        (input.grad, reference_input.grad),
        (layer.lora_A.grad, factors[0].grad),
        (layer.lora_B.grad, factors[1].grad),
    ]:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert layer.bias is not None
    assert layer.bias.grad is None
    assert layer.bias.requires_grad is False


@pytest.mark.parametrize("format", ["nf4", "nf3", "uint2", "int8"])
@pytest.mark.parametrize("storage", ["float32", "double"])
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(64, 48, 16), (50, 40, 64), (7, 100, 64), (9, 16, 16)]
)
def test_tiles_are_the_rows_of_the_whole(
    format: str, storage: str, rows: int, columns: int, block: int
) -> None:
    quantized = quantize(drawn(rows, columns), format, block, scale_storage=storage)
    for most in (1, 300, 1000, 10**6):
        tiles = list(quantized.tiles(most))
        assert [start for start, *_ in tiles] == [0, *(stop for _, stop, _ in tiles[:-1])]
        assert tiles[-1][1] == rows
        dense = torch.cat([tile.dequantize() for *_, tile in tiles])
        assert torch.equal(dense, quantized.dequantize())
        smallest = block // math.gcd(block, columns)
        assert all(stop - start <= max(smallest, most // columns) for start, stop, _ in tiles)


@pytest.mark.parametrize("format", ["nf4", "uint3"])
def test_a_layer_in_tiles_computes_what_a_whole_one_does(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for tile in (10**9, 500):
        monkeypatch.setattr(linear, "TILE", tile)
        layer, input = make(format), drawn(2, 3, 40).requires_grad_()
        output = layer(input)
        output.square().sum().backward()
        results.append((output.detach(), input.grad, layer.lora_A.grad, layer.lora_B.grad))
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-4)


def test_only_a_tile_is_dense_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "TILE", 400)
    sizes: list[int] = []
    whole = QuantizedTensor.dequantize

    def spy(self: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        sizes.append(math.prod(self.shape))
        return whole(self, dtype)

    monkeypatch.setattr(QuantizedTensor, "dequantize", spy)
    layer = make()
    layer(drawn(2, 40).requires_grad_()).sum().backward()
    assert len(sizes) > 4
    assert max(sizes) <= 400


def test_gradients_are_those_of_finite_differences() -> None:
    layer = make().double()
    assert torch.autograd.gradcheck(layer, drawn(3, 40, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradgradcheck(layer, drawn(3, 40, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.125])
def test_the_product_of_the_adapters_does_not_depend_on_the_scaling(scaling: float) -> None:
    lora_A, lora_B, packed = drawn(3, 40, seed=1), drawn(24, 3, seed=2), quantize(drawn(24, 40))
    layer = QuantLinear.from_parts(packed, None, lora_A, lora_B, scaling)
    expected = functional.linear(drawn(5, 40), packed.dequantize() + lora_B @ lora_A)
    torch.testing.assert_close(layer(drawn(5, 40)), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, lora_B @ lora_A)
    torch.testing.assert_close(layer.weight, packed.dequantize() + lora_B @ lora_A)


def test_without_adapters_it_is_the_frozen_weight_alone() -> None:
    layer = make(rank=0, bias=False)
    assert layer.rank == 0
    assert list(layer.parameters()) == []
    torch.testing.assert_close(layer(drawn(7, 40)), drawn(7, 40) @ layer.quantized.dequantize().T)


def test_only_the_adapters_are_trained() -> None:
    layer = make()
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    before = layer.codes.clone(), layer.absmax.clone()
    optimizer = torch.optim.SGD(
        [parameter for parameter in layer.parameters() if parameter.requires_grad], 0.1
    )
    layer(drawn(6, 40)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.codes, before[0])
    assert torch.equal(layer.absmax, before[1])


def test_the_graph_keeps_no_dense_weight_alive() -> None:
    layer = QuantLinear.from_parts(quantize(drawn(96, 80)))
    output = layer(drawn(2, 80).requires_grad_())
    gc.collect()
    alive = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.numel() == 96 * 80]
    assert alive == []
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        output = layer(drawn(2, 80).requires_grad_())
    assert all(each.numel() < 96 * 80 for each in saved)
    assert output.requires_grad


def test_the_cache_dequantizes_once_and_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.quantized import QuantizedTensor

    calls, original = [], QuantizedTensor.dequantize
    monkeypatch.setattr(
        QuantizedTensor, "dequantize", lambda self, *dtype: calls.append(1) or original(self, *dtype)
    )
    layer, input = make(), drawn(2, 40).requires_grad_()
    with cache_dequantized(layer):
        with torch.inference_mode():
            layer(input.detach())
        for _ in range(3):
            layer(input).sum().backward()
        assert len(calls) == 1
    layer(input).sum().backward()
    assert len(calls) == 3
    assert layer.cached() is None


def test_a_loaded_state_replaces_what_was_cached() -> None:
    layer, other = make(), QuantLinear.from_parts(quantize(drawn(24, 40, seed=9), "nf4", 16))
    with cache_dequantized(layer):
        layer(drawn(2, 40))
        layer.load_state_dict({**layer.state_dict(), "codes": other.codes, "absmax": other.absmax})
        torch.testing.assert_close(layer.cached(), other.quantized.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_module_leaves_the_packed_weight_alone(dtype: torch.dtype) -> None:
    layer = make()
    codes, absmax = layer.codes.clone(), layer.absmax.clone()
    layer.to(dtype)
    assert torch.equal(layer.codes, codes)
    assert layer.absmax.dtype == torch.float32
    assert torch.equal(layer.absmax, absmax)
    assert layer.weight.dtype == dtype
    assert layer(drawn(2, 40).to(dtype)).dtype == dtype
    layer.float()
    assert layer.weight.dtype == torch.float32


def test_adapters_in_float32_work_on_inputs_in_bfloat16() -> None:
    layer = make()
    output = layer(drawn(2, 40).bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(drawn(2, 40)), rtol=0.05, atol=0.5)
    output.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("cached", [False, True])
def test_it_runs_under_autocast(cached: bool) -> None:
    layer, input = make(), drawn(2, 40).requires_grad_()
    tree = layer if cached else nn.Identity()
    with cache_dequantized(tree, torch.bfloat16), torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(input)
        output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert input.grad.dtype == torch.float32
    expected, _ = dense_output(layer, input.detach().double())
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.5)


def test_the_state_goes_into_another_layer_bit_for_bit() -> None:
    layer, other = make("nf3", 2.0), make("nf3", 2.0)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert set(layer.state_dict()) == {"codes", "absmax", "bias", "lora_A", "lora_B", "_extra_state"}
    assert torch.equal(layer(drawn(3, 40)), other(drawn(3, 40)))


@pytest.mark.parametrize(("ours", "theirs"), [("nf4", "int4"), ("int4", "fp4"), ("nf2", "int2")])
def test_the_state_of_another_format_of_as_many_bits_is_refused(ours: str, theirs: str, tmp_path) -> None:
    layer, other = nn.Sequential(make(ours)), nn.Sequential(make(theirs))
    before = copy.deepcopy(layer.state_dict())
    save_file(other.state_dict(), tmp_path / "state.safetensors")
    with pytest.raises(QuantError, match=f"^the state of 0 is of format {theirs}, and the layer is {ours}"):
        layer.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_layer_goes_through_torch_export() -> None:
    layer = make().eval()
    exported = torch.export.export(layer, (drawn(2, 40),))
    torch.testing.assert_close(exported.module()(drawn(2, 40, seed=7)), layer(drawn(2, 40, seed=7)))
    torch.testing.assert_close(make()(drawn(2, 40)), layer(drawn(2, 40)))


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("format", format_names())
def test_an_embedding_gives_the_rows_of_the_dense_one(format: str, block_size: int) -> None:
    # A row of 48 is three blocks of 16, but one and a half of 32.
    quantized = quantize(drawn(11, 48), format, block_size)
    layer = QuantEmbedding(quantized)
    for index in (torch.tensor([[3, 0, 10], [3, 3, 1]]), torch.tensor(5), torch.zeros(0, dtype=torch.int64)):
        expected = functional.embedding(index, quantized.dequantize())
        assert torch.equal(layer(index), expected)
    assert layer.bfloat16()(torch.tensor([1])).dtype == torch.bfloat16
    assert layer.absmax.dtype == torch.float32


def test_an_embedding_dequantizes_only_the_rows_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.quantized import QuantizedTensor

    shapes, original = [], QuantizedTensor.dequantize
    monkeypatch.setattr(
        QuantizedTensor,
        "dequantize",
        lambda self, *dtype: shapes.append(self.shape) or original(self, *dtype),
    )
    QuantEmbedding(quantize(drawn(100, 32), block_size=32))(torch.tensor([[1, 2]]))
    assert shapes == [(2, 32)]


def test_shared_buffers_stay_shared_after_a_cast_a_copy_and_a_move() -> None:
    quantized = quantize(drawn(24, 32), block_size=32)
    tree = nn.ModuleDict({"embedding": QuantEmbedding(quantized), "head": QuantLinear.from_parts(quantized)})
    # The clone stands for a move to another device: either way every tensor becomes a new one.
    for moved in (tree, tree.bfloat16(), copy.deepcopy(tree), tree._apply(torch.clone)):
        assert moved["embedding"].codes is moved["head"].codes
        assert moved["embedding"].absmax is moved["head"].absmax
    assert tree.to("meta")["head"].codes.is_meta


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"bias": torch.zeros(3)}, "bias"),
        ({"lora_A": torch.zeros(2, 40)}, "only one"),
        ({"lora_A": torch.zeros(2, 40), "lora_B": torch.zeros(24, 3)}, "do not fit"),
        ({"scaling": 0.0}, "scaling of 0"),
        ({"scaling": float("nan")}, "scaling of nan"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict, match: str) -> None:
    with pytest.raises(QuantError, match=match):
        QuantLinear.from_parts(quantize(drawn(24, 40)), **parts)


def test_only_a_matrix_is_a_weight() -> None:
    with pytest.raises(QuantError, match=r"\(4, 4, 4\)"):
        QuantEmbedding(quantize(drawn(4, 4, 4)))
