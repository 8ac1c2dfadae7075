"""NF4 weights to and from bitsandbytes, bit for bit, and where quantize() and bitsandbytes part ways."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from quant import QuantError, QuantizedTensor, QuantLinear, get_format, quantize, unpack
from quant.bridges.bitsandbytes import (
    from_bitsandbytes,
    from_bitsandbytes_state,
    linear_from_bitsandbytes,
    linear_to_bitsandbytes,
    model_to_bitsandbytes_,
    to_bitsandbytes,
    to_bitsandbytes_state,
)

SHAPES = [(32, 128), (48, 40), (5, 13), (3, 4, 64), (17,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STORAGES = ["float32", "double"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert (one.shape, one.format, one.block_size) == (other.shape, other.format, other.block_size)
    assert one.parts().keys() == other.parts().keys()
    for name, part in one.parts().items():
        assert torch.equal(part, other.parts()[name]), name


# Without bitsandbytes: the entries of a state dict.


@pytest.mark.parametrize("storage", [*STORAGES, "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_dict_round_trip_is_exact(shape: tuple[int, ...], storage: str) -> None:
    packed = quantize(drawn(*shape), "nf4", 32, scale_storage=storage)
    state = to_bitsandbytes_state(packed, "a.b.weight", torch.bfloat16)
    same = from_bitsandbytes_state({"other": torch.zeros(1), **state}, "a.b.weight")
    if storage != "float16":
        assert_same(same, packed)
    assert torch.equal(same.dequantize(), packed.dequantize())


def test_other_formats_blocks_and_dtypes_are_refused() -> None:
    for packed, dtype, message in [
        (quantize(drawn(8, 64), "nf3"), torch.float32, "no format 'nf3'"),
        (quantize(drawn(8, 64), "fp4"), torch.float32, "no format 'fp4'"),
        (quantize(drawn(8, 64), "nf4", 16), torch.float32, "no blocks of 16"),
        (quantize(drawn(8, 64), "nf4"), torch.float64, "no torch.float64"),
    ]:
        with pytest.raises(QuantError, match=message):
            to_bitsandbytes_state(packed, dtype=dtype)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_state_dict_with_a_part_missing_or_foreign_is_refused(storage: str) -> None:
    state = to_bitsandbytes_state(quantize(drawn(8, 64), "nf4", scale_storage=storage))
    for key in state:
        with pytest.raises(QuantError, match=key.replace(".", r"\.")):
            from_bitsandbytes_state({name: part for name, part in state.items() if name != key})
    for key in state:
        if key.endswith("quant_map"):
            with pytest.raises(QuantError, match="not bitsandbytes' table"):
                from_bitsandbytes_state({**state, key: state[key].flip(0)})
    facts = state.pop("weight.quant_state.bitsandbytes__nf4")
    with pytest.raises(QuantError, match="fp4"):
        from_bitsandbytes_state({**state, "weight.quant_state.bitsandbytes__fp4": facts})


def test_other_blocks_of_the_scales_are_refused() -> None:
    state = to_bitsandbytes_state(quantize(drawn(8, 64), "nf4", scale_storage="double"))
    key = "weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(state[key].tolist())) | {"nested_blocksize": 128}
    state[key] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    with pytest.raises(QuantError, match="blocks of 128"):
        from_bitsandbytes_state(state)


# With it.


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_bitsandbytes_quantized_comes_over_and_back_exactly(
    shape: tuple[int, ...], dtype: torch.dtype, storage: str
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(
        drawn(*shape).to(dtype), blocksize=64, quant_type="nf4", compress_statistics=storage == "double"
    )
    packed = from_bitsandbytes(codes, state)
    assert packed.scales.storage == storage
    if shape[-1] % 64 == 0:  # bitsandbytes 0.50's CPU kernel misreads blocks that cross rows
        assert torch.equal(packed.dequantize(dtype), functional.dequantize_4bit(codes, state))
    back, back_state = to_bitsandbytes(packed, dtype)
    assert torch.equal(back, codes)
    ours, theirs = back_state.as_dict(packed=True), state.as_dict(packed=True)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("storage", STORAGES)
def test_bitsandbytes_dequantizes_ours_to_the_same_bits(storage: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed = quantize(drawn(64, 192), "nf4", scale_storage=storage)
    assert torch.equal(functional.dequantize_4bit(*to_bitsandbytes(packed)), packed.dequantize())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
def test_linear_layers_go_both_ways(storage: str, bias: bool) -> None:
    pytest.importorskip("bitsandbytes")
    packed = quantize(drawn(64, 128), "nf4", scale_storage=storage)
    layer = QuantLinear(packed, drawn(64, seed=1) if bias else None)
    theirs = linear_to_bitsandbytes(layer)
    input = drawn(3, 128, seed=2)
    torch.testing.assert_close(theirs.train()(input), layer(input), rtol=1e-5, atol=1e-5)
    state = theirs.state_dict()
    expected = to_bitsandbytes_state(packed)
    assert set(expected) == set(state) - {"bias"}
    assert all(torch.equal(expected[key], state[key]) for key in expected)
    back = linear_from_bitsandbytes(theirs)
    assert_same(back.quantized, packed)
    assert (back.bias is None) is not bias
    assert torch.equal(back(input), layer(input))


def test_a_layer_in_a_storage_dtype_for_sharding_is_read() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(linear_from_bitsandbytes(layer).quantized.dequantize(), expected)


def test_a_whole_model_goes_over_or_not_at_all() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(
        QuantLinear(quantize(drawn(32, 64))), nn.Sequential(QuantLinear(quantize(drawn(8, 32), "nf3")))
    )
    with pytest.raises(QuantError, match=r"^1\.0: bitsandbytes has no format 'nf3'"):
        model_to_bitsandbytes_(model)
    assert isinstance(model[0], QuantLinear)
    model[1] = nn.Linear(32, 8)
    assert model_to_bitsandbytes_(model) == ["0"]
    assert isinstance(model[0], bitsandbytes.nn.Linear4bit)


def test_weights_that_are_not_there_yet_or_were_repacked_are_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with pytest.raises(QuantError, match="not quantized yet"):
        linear_from_bitsandbytes(bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4"))
    codes, state = to_bitsandbytes(quantize(drawn(32, 64)))
    state.packing_format_for_cpu = True
    with pytest.raises(QuantError, match="repacked"):
        from_bitsandbytes(codes, state)


# How quantize() compares.


@pytest.mark.parametrize("block_size", [32, 64, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_of_random_weights_equal_bitsandbytes(dtype: torch.dtype, block_size: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(512, 512).to(dtype)
    assert_same(
        quantize(weight, "nf4", block_size),
        from_bitsandbytes(*functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")),
    )


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.1, 1e-30])
def test_codes_differ_only_where_a_reciprocal_rounds_across_a_midpoint(scale: float) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    levels = get_format("nf4").levels
    midpoints = (levels[1:] + levels[:-1]) / 2
    weight = midpoints[torch.randint(0, 15, (64, 64), generator=torch.Generator().manual_seed(0))]
    weight[:, 0] = 1
    weight = weight * scale
    codes, _ = functional.quantize_4bit(weight, quant_type="nf4")
    largest = weight.abs().amax(1, keepdim=True)
    by_reciprocal = torch.bucketize(weight * (1 / largest), midpoints)
    by_division = torch.bucketize(weight / largest, midpoints)
    assert torch.equal(unpack(codes.view(-1), 4, 4096).view(64, 64).long(), by_reciprocal)
    assert torch.equal(quantize(weight).unpacked_codes().long(), by_division)
    if math.log2(scale).is_integer():
        assert torch.equal(by_reciprocal, by_division)


def test_double_quantization_chooses_codes_by_the_scales_in_use_and_errs_less() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(512, 512)
    ours = quantize(weight, "nf4", scale_storage="double")
    theirs = from_bitsandbytes(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    assert torch.equal(ours.scales.absmax, theirs.scales.absmax)
    assert torch.equal(ours.scales.mean, theirs.scales.mean)
    assert float((ours.scales.stored != theirs.scales.stored).float().mean()) < 0.003
    differing = float((ours.unpacked_codes() != theirs.unpacked_codes()).float().mean())
    assert 0.001 < differing < 0.01
    assert (ours.dequantize() - weight).norm() < (theirs.dequantize() - weight).norm()


def test_zeros_are_zeros_in_both() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in ((4, 64), (3, 30)):
        theirs = from_bitsandbytes(*functional.quantize_4bit(torch.zeros(shape), quant_type="nf4"))
        assert torch.equal(quantize(torch.zeros(shape)).codes, theirs.codes)
        assert not theirs.dequantize().any()
