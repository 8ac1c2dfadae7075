"""The certificate holds on right groups and fails on every kind of wrong one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import traced
from torch import nn

from graphprune.certify import certificate as module_of_certificate
from graphprune.certify.certificate import certify
from graphprune.coupling import analysis
from graphprune.coupling.groups import node_groups
from graphprune.errors import CouplingError, InputsError, NothingPrunableError, VerificationError
from graphprune.shrink import resizers
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.trace.model import trace


def test_llama_with_adapters_is_certified(adapted):
    certificate = certify(adapted.model, adapted.groups, adapted.inputs)
    assert certificate.groups == len(adapted.groups) - 1  # all but the vocabulary
    assert certificate.permuted_max_error < 1e-12
    assert certificate.removed_max_error < 1e-12
    assert certificate.removed_effect > 1e-2
    assert certificate.failures == ()
    certificate.raise_if_failed()


@pytest.mark.parametrize(
    "wrong",
    [{"removed_max_error": float("nan")}, {"permuted_max_error": float("nan")}, {"removed_effect": 0.0}],
)
def test_a_number_that_proves_nothing_is_no_proof(llama, wrong):
    certificate = certify(llama.model, llama.groups, llama.inputs)
    assert certificate.ok
    doubtful = dataclasses.replace(certificate, **wrong)
    assert not doubtful.ok
    with pytest.raises(VerificationError, match="nothing is proven" if "removed_effect" in wrong else "nan"):
        doubtful.raise_if_failed()


@pytest.mark.parametrize("seed", range(3))
def test_any_random_choice_of_units_is_certified(llama, seed):
    assert certify(llama.model, llama.groups, llama.inputs, seed=seed).ok


def test_a_norm_without_an_epsilon_has_that_of_its_own_type():
    """In float32 it is half a billion times that of float64, in which the check runs."""
    torch.manual_seed(0)
    model, inputs = (
        nn.Sequential(nn.Linear(3, 8), nn.RMSNorm(8), nn.Linear(8, 2)),
        {"input": torch.randn(7, 3)},
    )
    assert certify(model, node_groups(trace(model, inputs)), inputs).ok


def test_the_model_is_not_changed(llama):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    certify(llama.model, llama.groups, llama.inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())


def broken_rule(monkeypatch, target, rule):
    real = analysis.rule_for
    monkeypatch.setattr(analysis, "rule_for", lambda name: rule if name == target else real(name))


def test_a_rule_that_does_not_couple_is_caught(monkeypatch, build_llama):
    """gate × up whose operands are taken for independent."""

    def one_sided(operator, algebra):
        return algebra.broadcast(operator.inputs[:1], operator.outputs[0].shape)

    broken_rule(monkeypatch, "aten.mul.Tensor", one_sided)
    wrong = traced(build_llama())
    certificate = certify(wrong.model, wrong.groups, wrong.inputs)
    assert not certificate.ok
    assert any("mlp" in name for name in certificate.failures)
    with pytest.raises(VerificationError, match="node groups are wrong"):
        certificate.raise_if_failed()


def test_a_rule_that_reads_segments_in_the_wrong_order_is_caught(monkeypatch, build_llama):
    """A concatenation taken the other way round breaks rotary embedding."""

    def backwards(operator, algebra):
        values = operator["tensors"]
        axes = list(algebra[values[0]])
        axes[-1] = algebra.concat([algebra[value][-1] for value in reversed(values)])
        return axes

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], -1))

    broken_rule(monkeypatch, "aten.cat.default", backwards)
    torch.manual_seed(0)
    model, inputs = Fused(), {"x": torch.randn(5, 3)}
    assert not certify(model, node_groups(trace(model, inputs)), inputs).ok


def test_a_size_left_stale_is_caught(monkeypatch, adapted):
    """A mean that divides by the new width instead of the old one."""
    monkeypatch.delitem(resizers._RESIZERS, "aten.mean")
    certificate = certify(adapted.model, adapted.groups, adapted.inputs)
    assert certificate.permuted_max_error < 1e-12
    assert certificate.removed_max_error > 1e-6
    assert any(name.endswith(":hidden") for name in certificate.failures)


def test_a_member_dropped_is_caught(adapted, monkeypatch):
    """One adapter that does not follow its layer."""
    real = module_of_certificate.select_weight

    def forgetful(name, tensor, groups, kept):
        return (
            tensor
            if name.endswith("layers.1.mlp.up_proj.base_layer.weight")
            else real(name, tensor, groups, kept)
        )

    monkeypatch.setattr(module_of_certificate, "select_weight", forgetful)
    monkeypatch.setattr(module_of_certificate._Trial, "removed_error", lambda self, groups: (0.0, 1.0))
    assert certify(adapted.model, adapted.groups, adapted.inputs).permuted_max_error > 1e-6


def test_few_wrong_groups_among_many_are_found_in_few_trials(adapted, monkeypatch):
    """Halves that hold are not looked into."""
    movable = [group.name for group in adapted.groups.values() if group.permutable]
    wrong, asked = {movable[2], movable[-1]}, []

    def error(self, groups):
        asked.append(len(groups))
        return float(any(group.name in wrong for group in groups))

    monkeypatch.setattr(module_of_certificate._Trial, "permuted_error", error)
    certificate = certify(adapted.model, adapted.groups, adapted.inputs)
    assert set(certificate.failures) == wrong
    assert len(asked) <= 1 + 2 * 2 * len(movable).bit_length()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_exported_by_hand_is_certified_in_float64(build_llama, dtype):
    """Exported with gradients, its rotary angles are a graph of their own, which asserts the types it was given."""
    model = build_llama().to(dtype)
    inputs = {"input_ids": torch.arange(22).reshape(2, 11) % 60, "use_cache": False}
    program = torch.export.export(model, (), kwargs=inputs, strict=False)
    assert any(isinstance(part, torch.fx.GraphModule) for part in program.graph_module.children())
    groups = node_groups(trace(program))
    certificate = certify(model, groups, inputs)
    assert certificate.ok
    assert certificate.tolerance == 1e-9
    assert certify(program, groups).ok
    name = next(group.name for group in groups.prunable() if group.kind == "ffn")
    small = shrink(program, groups, Plan({name: [0]}))
    with torch.no_grad():  # types asserted nowhere: it runs in another one
        assert small.double()(**inputs).logits.dtype is torch.float64


def test_a_program_exported_with_positions_is_certified_on_its_own_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    program = torch.export.export(model, (torch.randn(5, 6),), strict=False)
    assert certify(model, node_groups(trace(program))).ok


def test_nothing_to_permute_is_an_error_that_lists_each_reason_once():
    model = nn.Sequential(nn.Linear(3, 2), nn.Softmax(-1), nn.LSTM(2, 4, batch_first=True))
    inputs = {"input": torch.zeros(4, 5, 3)}
    groups = node_groups(trace(model, inputs, dynamic=False))
    reasons = {group.reason for group in groups.values()}
    assert 1 < len(reasons) < len(groups)
    for ask in (lambda: certify(model, groups, inputs), groups.prunable):
        with pytest.raises(NothingPrunableError, match=f"none of the {len(groups)} node groups") as caught:
            ask()
        lines = caught.value.problem.split("\n  - ")[1:]
        assert sorted(line.rsplit(" (", 1)[0] for line in lines) == sorted(reasons)
        assert " more)" in lines[0]
        assert all(any(f"({name}" in line for name in groups) for line in lines)


def test_inputs_need_no_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    groups = node_groups(trace(model, torch.randn(5, 6)))
    for inputs in (torch.randn(5, 6), (torch.randn(4, 6),), {"input": torch.randn(5, 6)}, None):
        assert certify(model, groups, inputs).ok


@pytest.mark.parametrize("inputs", [{"x": torch.zeros(2, 7, dtype=torch.long)}, {"attention_mask": None}])
def test_a_missing_input_is_named(llama, inputs):
    with pytest.raises(InputsError, match=f"not given: input_ids, use_cache\n.*these were: {min(inputs)}"):
        certify(llama.model, llama.groups, inputs)


def test_groups_of_another_model_are_refused(llama, build_llama):
    wider = nn.ModuleDict({"model": build_llama(attention_bias=True).model})
    with pytest.raises(CouplingError, match=r"of another model: they know 'lm_head|embed_tokens"):
        certify(nn.Linear(3, 2), llama.groups, llama.inputs)
    del wider["model"].layers[1]
    with pytest.raises(CouplingError, match=r"'model\.layers\.1\..*' .* not at all"):
        certify(wider, llama.groups, llama.inputs)
    with pytest.raises(CouplingError, match="a dict is not the node groups"):
        certify(llama.model, dict(llama.groups), llama.inputs)
    with pytest.raises(CouplingError, match="a str is not the model"):
        certify("model", llama.groups, llama.inputs)


class Generated(nn.Module):
    """A chain of blocks drawn by hypothesis, on a residual stream."""

    def __init__(self, blocks: list[str], heads: int, width: int) -> None:
        super().__init__()
        self.blocks, self.heads, self.width = blocks, heads, width
        size = heads * width
        self.inward, self.outward = nn.Linear(3, size), nn.Linear(size, 2)
        self.layers = nn.ModuleList(nn.ModuleDict(self._parts(block, size)) for block in blocks)

    def _parts(self, block: str, size: int) -> dict[str, nn.Module]:
        if block == "gated":
            return {"fused": nn.Linear(size, 10), "down": nn.Linear(5, size)}
        if block == "attention":
            return {"qkv": nn.Linear(size, 3 * size), "out": nn.Linear(size, size)}
        if block == "interleaved":
            return {"qkv": nn.Linear(size, 3 * size, bias=False), "out": nn.Linear(size, size)}
        if block == "norm":
            return {"norm": nn.LayerNorm(size)}
        return {"a": nn.Linear(size, 4), "b": nn.Linear(size, 3), "down": nn.Linear(7, size)}

    def forward(self, x):
        x = self.inward(x)
        for block, layer in zip(self.blocks, self.layers):
            x = x + getattr(self, block)(layer, x)
        return self.outward(x)

    def gated(self, layer, x):
        gate, up = layer["fused"](x).chunk(2, dim=-1)
        return layer["down"](torch.sigmoid(gate) * up)

    def attention(self, layer, x):
        q, k, v = layer["qkv"](x).chunk(3, dim=-1)
        q, k, v = (t.view(*t.shape[:-1], self.heads, self.width).transpose(1, 2) for t in (q, k, v))
        return layer["out"](self._attend(q, k, v).transpose(1, 2).flatten(2))

    def interleaved(self, layer, x):
        fused = layer["qkv"](x).view(*x.shape[:-1], self.heads, 3 * self.width).transpose(1, 2)
        return layer["out"](self._attend(*fused.chunk(3, dim=-1)).transpose(1, 2).reshape(*x.shape))

    def _attend(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)

    def norm(self, layer, x):
        return layer["norm"](x)

    def concat(self, layer, x):
        return layer["down"](torch.cat([layer["a"](x), torch.relu(layer["b"](x))], -1))


@settings(max_examples=25)
@given(
    st.lists(
        st.sampled_from(["gated", "attention", "interleaved", "norm", "concat"]), min_size=1, max_size=4
    ),
    st.integers(2, 3),
    st.integers(2, 4),
    st.integers(0, 99),
)
def test_generated_networks_are_certified_and_lose_no_group(blocks, heads, width, seed):
    torch.manual_seed(seed)
    model = Generated(blocks, heads, width).eval()
    inputs = {"x": torch.randn(2, 7, 3)}
    groups = node_groups(trace(model, inputs))
    assert certify(model, groups, inputs, seed=seed).ok
    prunable = sorted(group.size for group in groups.values() if group.prunable)
    expected: list[int] = [] if "norm" in blocks else [heads * width]
    for block in blocks:
        if block == "gated":
            expected += [5]
        elif block == "concat":
            expected += [4, 3]
        elif block in ("attention", "interleaved"):
            expected += [heads, width, width]  # heads, query-key width, value width
    assert prunable == sorted(expected)
