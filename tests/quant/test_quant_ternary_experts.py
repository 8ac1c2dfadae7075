"""Packed experts are decoded one at a time, and serve a mixture as its own."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 -- a user may pass a model to another process; no file of ours is written so
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant import QuantError
from quant.ternary import (
    DecodedExperts,
    PackedExperts,
    TernaryConfig,
    TernaryTensor,
    collect_expert_inputs,
    quantize_experts,
    replace_parameter_,
)


class Mixture(nn.Module):
    """A mixture of experts as it is written everywhere: a stacked parameter, read expert by expert."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, width))
        self.down = nn.Parameter(torch.randn(experts, width, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        output = torch.zeros_like(tokens)
        for expert in chosen.unique():
            here = chosen == expert
            hidden = functional.linear(tokens[here], self.up[expert]).relu()
            output[here] = gate[here, None] * functional.linear(hidden, self.down[expert])
        return output


def packed_mixture(decoded: DecodedExperts | None = None) -> tuple[Mixture, Mixture]:
    """Return a mixture of packed experts, and one of the same weights, dense."""
    torch.manual_seed(0)
    packed = Mixture(6, 32, 48)
    dense = copy.deepcopy(packed)
    for name in ("up", "down"):
        weight = packed.get_parameter(name)
        config = TernaryConfig(block_size=16, scale_storage="float32")
        quantized = quantize_experts(weight, config=config).quantized
        assert isinstance(quantized, TernaryTensor)
        replace_parameter_(packed, name, PackedExperts(quantized, decoded=decoded))
        dense.get_parameter(name).data = quantized.dequantize()
    return packed, dense


@pytest.mark.parametrize("kept", [3, 12])
def test_a_mixture_runs_on_packed_experts(kept: int) -> None:
    decoded = DecodedExperts(kept * 32 * 48 * 4)
    packed, dense = packed_mixture(decoded)
    tokens = torch.randn(20, 32, requires_grad=True)
    with torch.inference_mode():
        packed(tokens)
    torch.testing.assert_close(packed(tokens), dense(tokens), rtol=0, atol=0)
    assert decoded.nbytes <= decoded.most_bytes
    gradients = [torch.autograd.grad(model(tokens).sum(), tokens)[0] for model in (packed, dense)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert [name for name, _ in packed.named_parameters()] == ["router.weight"]


def test_the_inputs_of_each_expert_are_summed() -> None:
    torch.manual_seed(0)
    model = Mixture(6, 32, 48)
    batches = [torch.randn(30, 32), torch.randn(20, 32)]
    found = collect_expert_inputs(model, batches, ["up", "down"])
    tokens = torch.cat(batches)
    chosen = model.router(tokens).argmax(-1)
    for expert in range(6):
        inputs = tokens[chosen == expert]
        hidden = (inputs @ model.up[expert].T).relu().detach()
        for name, expected in (("up", inputs), ("down", hidden)):
            assert int(found[name].tokens[expert]) == len(expected)
            torch.testing.assert_close(
                found[name].covariance[expert], expected.T @ expected, rtol=1e-4, atol=1e-3
            )
    result = quantize_experts(model.up, found["up"].covariance, found["up"].tokens)
    assert result.report.compensated == int((found["up"].tokens >= TernaryConfig().fewest_tokens).sum())
    with pytest.raises(QuantError, match="was given to linear"):
        collect_expert_inputs(model, [], ["up"])
    with pytest.raises(QuantError, match="not a stack of experts"):
        collect_expert_inputs(model, batches, ["router.weight"])


def test_the_last_used_experts_are_kept_within_the_bound() -> None:
    decoded = DecodedExperts(250)
    made: list[int] = []

    def ask(owner: object, expert: int) -> None:
        decoded.get(owner, expert, lambda: made.append(expert) or torch.zeros(25))  # type: ignore[func-returns-value]

    one, other = object(), object()
    for expert in (0, 1, 0, 2, 0, 1):
        ask(one, expert)
        assert decoded.nbytes <= 250
    assert made == [0, 1, 2, 1]
    ask(other, 0)
    decoded.drop(other)
    ask(one, 1)
    assert made == [0, 1, 2, 1, 0]
    assert decoded.nbytes == 100


def test_an_expert_larger_than_the_bound_is_not_kept() -> None:
    decoded = DecodedExperts(100)
    small = decoded.get(decoded, 0, lambda: torch.ones(20))
    assert decoded.get(decoded, 1, lambda: torch.ones(26)).sum() == 26
    assert decoded.nbytes == 80
    assert decoded.get(decoded, 0, lambda: torch.ones(20)) is small


def test_casts_leave_what_is_stored_and_change_what_is_decoded() -> None:
    packed, dense = packed_mixture(DecodedExperts(1 << 20))
    stored = {
        name: buffer.clone()
        for name, buffer in packed.state_dict().items()
        if "." in name and "router" not in name
    }
    assert packed.up[0].dtype == torch.float32
    packed.to(torch.float16)
    assert packed.up[0].dtype == torch.float16
    after = packed.state_dict()
    assert all(
        torch.equal(after[name], buffer) and after[name].dtype == buffer.dtype
        for name, buffer in stored.items()
    )
    packed.float()
    torch.testing.assert_close(packed.up.dequantize(), dense.up.data, rtol=0, atol=0)
    torch.testing.assert_close(packed.up[torch.tensor([3, 1])], dense.up.data[[3, 1]], rtol=0, atol=0)


def test_a_copy_keeps_its_own_experts() -> None:
    decoded = DecodedExperts(1 << 20)
    packed, dense = packed_mixture(decoded)
    packed.up[0]
    twin = copy.deepcopy(packed)
    twin.up.levels.zero_()
    twin.up.load_state_dict(twin.up.state_dict())
    assert not twin.up[0].any()
    assert torch.equal(packed.up[0], dense.up[0])


def test_experts_are_counted_and_iterated_as_a_parameters_are() -> None:
    packed, dense = packed_mixture()
    assert len(packed.up) == len(dense.up) == 6
    assert [torch.equal(one, other) for one, other in zip(packed.up, dense.up, strict=True)] == [True] * 6
    for index in (torch.tensor(4), np.int64(4), torch.tensor([[1, 4], [0, 4]])):
        assert torch.equal(packed.up[index], dense.up[index])


@pytest.mark.parametrize("index", [slice(1, 3), (1, 2), None, 1.0, torch.ones(6) > 0, torch.tensor(1.5)])
def test_what_is_no_number_of_an_expert_is_refused(index: Any) -> None:
    packed, _ = packed_mixture()
    with pytest.raises(QuantError, match="is no number of an expert"):
        packed.up[index]


def test_packed_experts_are_pickled_with_their_bits_and_without_what_was_decoded() -> None:
    decoded = DecodedExperts(1 << 20)
    packed, dense = packed_mixture(decoded)
    packed.up[0]
    packed.half()
    packed.up[1]
    assert decoded.nbytes
    written = pickle.dumps(packed)
    again = pickle.loads(written)  # noqa: S301 -- written above
    state = packed.state_dict()
    assert state["up.codes"].dtype == torch.uint16
    for name, held in again.state_dict().items():
        assert held.dtype == state[name].dtype
        assert torch.equal(held, state[name])
    assert torch.equal(again.up[2], dense.up[2].half())
    assert again.up.decoded.most_bytes == decoded.most_bytes
    assert again.up.decoded.nbytes == again.up[2].nbytes
    # The one that is left goes on as it was.
    assert torch.equal(packed.up[2], dense.up[2].half())
    tensor = pickle.loads(pickle.dumps(packed.up.quantized))  # noqa: S301 -- as above
    assert torch.equal(tensor.dequantize(), dense.up)


@pytest.mark.parametrize("columns", [32, 31], ids=["whole blocks", "blocks cross experts"])
def test_two_bit_experts_are_served_too(columns: int) -> None:
    weight = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(0))
    result = quantize_experts(weight, config=TernaryConfig(most_bits=0.1, block_size=16))
    packed = PackedExperts(result.quantized)
    for expert in range(3):
        assert torch.equal(packed[expert], result.quantized.dequantize()[expert])


def test_the_state_of_other_dictionaries_is_refused() -> None:
    packed, _ = packed_mixture()
    ours = packed.up.quantized
    other = PackedExperts(TernaryTensor(**ours.parts(), shape=ours.shape, zeros=999, longest=ours.longest))
    with pytest.raises(
        QuantError, match=rf"format ternary \(zeros {ours.zeros}, .* the layer is .*zeros 999"
    ):
        other.load_state_dict(packed.up.state_dict())
    packed.up.load_state_dict(packed.up.state_dict())


def test_a_forward_that_wants_one_tensor_is_told_what_to_do() -> None:
    packed, _ = packed_mixture()
    with pytest.raises(AttributeError, match="read them one by one"):
        packed.up.transpose(1, 2)
    with pytest.raises(QuantError, match="no expert 6 among 6"):
        packed.up[6]
    with pytest.raises(QuantError, match="not one of shape"):
        replace_parameter_(packed, "router", packed.up)
    assert "bits a weight" in repr(packed)


def test_qwen3_moe_of_transformers_runs_on_packed_experts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=48,
        moe_intermediate_size=64,
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=67,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    dense, decoded = copy.deepcopy(model), DecodedExperts(4 * 48 * 64 * 4)
    tokens = torch.arange(60).view(4, 15)
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    inputs = collect_expert_inputs(model, [tokens], names)
    assert all(int(inputs[name].tokens.sum()) == 2 * tokens.numel() for name in names)
    before = sum(model.get_parameter(name).nbytes for name in names)
    for name in names:
        seen = inputs[name]
        how = TernaryConfig(block_size=16, scale_storage="float32")
        result = quantize_experts(model.get_parameter(name), seen.covariance, seen.tokens, how, name)
        assert result.report.format == "ternary"
        assert result.report.compensated
        path, _, last = name.rpartition(".")
        replace_parameter_(model.get_submodule(path), last, PackedExperts(result.quantized, decoded=decoded))
        dense.get_parameter(name).data = result.quantized.dequantize()
    after = sum(buffer.nbytes for name, buffer in model.named_buffers() if ".experts." in name)
    assert after < before / 12
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=0, atol=0)
    assert 0 < decoded.nbytes <= decoded.most_bytes
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad(), pytest.raises(AttributeError, match="experts_implementation='eager'"):
        model(tokens)
