"""LoftQ in PEFT models, against PEFT's own on the CPU and the paper's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import (
    LINEARS,
    TARGETS,
    TOKENS,
    adapted,
    effective,
    gpt2,
    llama,
    logits,
    lora_layers,
    mixtral,
    seeded,
)
from torch import nn

from quant import PackedParameter, QuantError, QuantLinear, get_format, quantize
from quant.bridges.peft import loftq_peft_

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted_by_peft(steps: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> nn.Module:
    """PEFT's own LoftQ; its "cuda" is the CPU here, where bitsandbytes misreads blocks that cross rows."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for owner in (torch.Tensor, bitsandbytes.nn.Params4bit):

        def to(self: Any, *args: Any, _to: Any = owner.to, **kwargs: Any) -> Any:
            swapped = ["cpu" if isinstance(each, str) and each == "cuda" else each for each in args]
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return _to(self, *swapped, **kwargs)

        monkeypatch.setattr(owner, "to", to)
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 8, **TARGETS[llama], **options})
    # Set afterwards: a LoraConfig made so asks for scipy, which LoftQ no longer uses.
    config.init_lora_weights = "loftq"
    config.loftq_config = {"loftq_bits": 4, "loftq_iter": steps}
    model = seeded(lambda: peft.get_peft_model(llama(), config))
    monkeypatch.undo()
    return model


def papers_loftq(weight: torch.Tensor, rank: int, steps: int, block_size: int = 64) -> torch.Tensor:
    """Algorithm 1 of the LoftQ paper in float64 with a full SVD: Q + A B of the last iterate."""
    weight = weight.detach().double()
    levels = get_format("nf4").levels.double()
    product = torch.zeros_like(weight)
    for _ in range(steps):
        blocks = (weight - product).reshape(-1, block_size)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = ((blocks / scale)[:, :, None] - levels).abs().argmin(2)
        quantized = (levels[nearest] * scale).view_as(weight)
        left, sizes, right = torch.linalg.svd(weight - quantized, full_matrices=False)
        product = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    return quantized + product


SCALINGS = [{"lora_alpha": 4}, {"lora_alpha": 8}, {"lora_alpha": 16}, {"lora_alpha": 8, "use_rslora": True}]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("build", list(TARGETS))
def test_first_logits_are_nearer_to_the_float_models_than_qloras(
    build: Callable[[], nn.Module], scaling: dict[str, Any]
) -> None:
    wanted = logits(build())
    distances = {}
    for iterations in (0, 1, 5):
        model = adapted(build, **scaling)
        loftq_peft_(model, "nf4", iterations, 32)
        distances[iterations] = float((logits(model) - wanted).norm() / wanted.norm())
    assert distances[5] < 0.85 * distances[0]
    assert distances[1] < 0.95 * distances[0]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_each_layer_is_the_papers_formula_whatever_its_scaling(
    build: Callable[[], nn.Module], scaling: dict[str, Any]
) -> None:
    original, model = build(), adapted(build, **scaling)
    reports = loftq_peft_(model, "nf4", 2)
    layers = lora_layers(model)
    assert [report.name for report in reports] == list(layers)
    for report in reports:
        layer = layers[report.name]
        weight = original.get_submodule(report.name).weight
        expected = papers_loftq(weight.T if layer.fan_in_fan_out else weight, 8, 2)
        torch.testing.assert_close(effective(layer), expected, rtol=1e-4, atol=1e-5)
        assert report.shape == tuple(expected.shape)
        assert report.bytes_before == report.bytes_after


@pytest.mark.parametrize("steps", [1, 3])
def test_peft_itself_finds_the_same_where_it_is_right(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = adapted_by_peft(steps, monkeypatch), adapted(llama)
    loftq_peft_(ours, "nf4", steps)
    for name, layer in lora_layers(ours).items():
        their_layer = lora_layers(theirs)[name]
        if steps == 1:
            assert torch.equal(layer.get_base_layer().weight, their_layer.get_base_layer().weight)
        torch.testing.assert_close(effective(layer), effective(their_layer), rtol=1e-3, atol=1e-5)


def test_peft_itself_overcorrects_where_alpha_is_not_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    original = llama()
    for scaling, least in (({"lora_alpha": 16}, 0.99), ({"lora_alpha": 8, "use_rslora": True}, 1.2)):
        theirs, ours = adapted_by_peft(1, monkeypatch, **scaling), adapted(llama, **scaling)
        loftq_peft_(ours, "nf4", 1)
        for name, layer in lora_layers(ours).items():
            weight = original.get_submodule(name).weight.double()
            plain = (quantize(weight).dequantize(torch.float64) - weight).norm()
            assert (effective(layer) - weight).norm() < 0.95 * plain
            assert (effective(lora_layers(theirs)[name]) - weight).norm() > least * plain


def test_ranks_and_alphas_may_differ_by_layer() -> None:
    original = llama()
    model = adapted(llama, rank_pattern={"q_proj": 16}, alpha_pattern={"up_proj": 3, "0.mlp.gate_proj": 64})
    loftq_peft_(model, "nf4", 2)
    for name, layer in lora_layers(model).items():
        weight = original.get_submodule(name).weight
        rank = 16 if name.endswith("q_proj") else 8
        assert layer.lora_A["default"].weight.shape[0] == rank
        expected = papers_loftq(weight, rank, 2)
        torch.testing.assert_close(effective(layer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_dora_starts_at_the_same_weights(build: Callable[[], nn.Module], packed: bool) -> None:
    plain, dora = adapted(build, lora_alpha=16), adapted(build, lora_alpha=16, use_dora=True)
    for model in (plain, dora):
        loftq_peft_(model, "nf4", 2, packed=packed)
    torch.testing.assert_close(logits(dora), logits(plain), rtol=1e-4, atol=1e-4)
    magnitudes = [each for name, each in dora.named_parameters() if "magnitude" in name]
    assert len(magnitudes) == len(lora_layers(dora))
    assert all(each.requires_grad for each in magnitudes)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_an_embedding_gets_its_own_factors(packed: bool, use_dora: bool) -> None:
    original = llama()
    model = adapted(llama, target_modules=["embed_tokens"], lora_alpha=16, use_dora=use_dora)
    (report,) = loftq_peft_(model, "nf4", 2, 32, packed=packed)
    assert report.name == "model.embed_tokens"
    expected = papers_loftq(original.model.embed_tokens.weight, 8, 2, 32)
    with torch.no_grad():
        rows = model.base_model.model.model.embed_tokens(torch.arange(50)).double()
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_a_head_tied_to_the_embedding_is_right_in_both_or_refused() -> None:
    wanted = logits(gpt2())
    model = adapted(gpt2, target_modules=["wte"])
    before = model.base_model.model.lm_head.weight.detach().clone()
    with pytest.raises(QuantError, match=r"transformer\.wte shares its weight with lm_head, which has no"):
        loftq_peft_(model)
    assert torch.equal(model.base_model.model.lm_head.weight, before)
    distances = []
    for iterations, packed in ((0, False), (5, False), (5, True)):
        model = adapted(gpt2, target_modules=["wte", "lm_head"], lora_alpha=16)
        reports = loftq_peft_(model, "nf4", iterations, packed=packed)
        assert [report.bytes_before > 10000 for report in reports] == [True, False]
        distances.append(float((logits(model) - wanted).norm()))
    assert distances[1] < 0.9 * distances[0]
    assert distances[2] == pytest.approx(distances[1], rel=1e-3)
    head = model.base_model.model.lm_head.base_layer
    assert head.codes is model.base_model.model.transformer.wte.base_layer.parametrizations["weight"][0].codes


def test_each_expert_is_its_own_loftq_in_pefts_layout() -> None:
    original, model = mixtral(), adapted(mixtral, lora_alpha=4)
    reports = {report.name: report for report in loftq_peft_(model, "nf4", 2)}
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    for layer, key in ((wrapper, "down_proj"), (wrapper.base_layer, "gate_up_proj")):
        name = f"model.layers.1.mlp.experts.{key}"
        assert name in reports
        weight = original.get_parameter(name)
        base = layer.get_base_layer().get_parameter(key).double()
        with torch.no_grad():
            found = base + layer.get_delta_weight("default").double()
        for expert in range(4):
            expected = papers_loftq(weight[expert], 8, 2)
            torch.testing.assert_close(found[expert], expected, rtol=1e-4, atol=1e-5)


def test_covariances_reach_their_layers() -> None:
    name = "model.layers.0.self_attn.q_proj"
    factor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    factor[:, :8] *= 20
    weight = llama().get_submodule(name).weight.double()
    errors = []
    for covariances in (None, {name: (factor.T @ factor).float()}):
        model = adapted(llama)
        loftq_peft_(model, "nf4", 1, covariances=covariances)
        errors.append(float(((effective(lora_layers(model)[name]) - weight) @ factor.T).norm()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_packed_base_computes_the_same_in_fewer_bytes_and_refuses_to_merge(
    build: Callable[[], nn.Module],
) -> None:
    dense, packed = adapted(build, lora_alpha=16), adapted(build, lora_alpha=16)
    loftq_peft_(dense, "nf4", 2)
    reports = loftq_peft_(packed, "nf4", 2, packed=True)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-4)
    assert all(
        type(layer.base_layer) is QuantLinear
        or isinstance(layer.base_layer.parametrizations["weight"][0], PackedParameter)
        for layer in lora_layers(packed).values()
    )
    assert (
        sum(report.bytes_after for report in reports) < sum(report.bytes_before for report in reports) / 1.8
    )
    packed(input_ids=TOKENS).logits.sum().backward()
    learning = {name for name, each in packed.named_parameters() if each.grad is not None}
    assert learning == {name for name, _ in packed.named_parameters() if "lora_" in name}
    with pytest.raises(QuantError, match="is packed already"):
        loftq_peft_(packed)
    with pytest.raises(QuantError, match="cannot be merged"):
        packed.merge_and_unload()


def test_several_adapters_share_one_base() -> None:
    original = llama()
    model = adapted(llama)
    model.add_adapter("small", peft.LoraConfig(r=2, lora_alpha=8, target_modules=LINEARS[:2]))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(QuantError, match=r"q_proj has other adapters too \(small\)"):
        loftq_peft_(model)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    loftq_peft_(model, "nf4", 2, adapter_name=["small", "default"])
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    weight = original.get_submodule("model.layers.0.self_attn.q_proj").weight.detach().double()
    base = layer.get_base_layer().weight.detach().double()
    for adapter, rank in (("default", 8), ("small", 2)):
        left, sizes, right = torch.linalg.svd(weight - base)
        expected = base + (left[:, :rank] * sizes[:rank]) @ right[:rank]
        torch.testing.assert_close(effective(layer, adapter), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_models_keep_their_dtypes() -> None:
    model = adapted(llama).to(torch.bfloat16)
    before = {name: each.dtype for name, each in model.named_parameters()}
    loftq_peft_(model, "nf4", 1)
    assert {name: each.dtype for name, each in model.named_parameters()} == before
    assert logits(model).isfinite().all()


def broken(problem: str) -> nn.Module:
    if problem == "not a PEFT":
        return llama()
    if problem == "pissa":
        return adapted(llama, init_lora_weights="pissa")
    model = adapted(llama, **({"lora_alpha": 0} if problem == "scales 'default' by 0" else {}))
    layer = lora_layers(model)["model.layers.1.mlp.down_proj"]
    if problem == "merged":
        model.merge_adapter()
    if problem == "nan":
        layer.get_base_layer().weight.data[0, 0] = torch.nan
    if problem == "meta device":
        layer.base_layer.to("meta")
    return model


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("not a PEFT", "has no adapter 'default'"),
        ("pissa", "init_lora_weights='pissa'"),
        ("scales 'default' by 0", r"model\.layers\.0\.self_attn\.q_proj scales 'default' by 0"),
        ("merged", r"model\.layers\.0\.self_attn\.q_proj has adapters merged"),
        ("nan", r"model\.layers\.1\.mlp\.down_proj of shape .* nan"),
        ("meta device", r"model\.layers\.1\.mlp\.down_proj of shape .* meta device"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_before_anything_changes(problem: str, message: str) -> None:
    model = broken(problem)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(QuantError, match=message):
        loftq_peft_(model)
    for name, each in model.state_dict().items():
        assert each.is_meta or torch.equal(each.nan_to_num(), before[name].nan_to_num())


def test_layers_without_loftq_are_refused_by_name() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(QuantError, match=r"^0 is a peft\.tuners\.lora\.layer\.Conv2d"):
        loftq_peft_(model)
    with pytest.raises(QuantError, match=r"experts\.down_proj is a parameter that PEFT wraps anew"):
        loftq_peft_(adapted(mixtral), packed=True)
    with pytest.raises(QuantError, match="has no adapter 'other'"):
        loftq_peft_(adapted(llama), adapter_name="other")
