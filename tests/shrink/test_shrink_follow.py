"""A module is returned where its own code computes what the shrunk graph does, however small the difference."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn
from zeroed import zeroed

from graphprune.coupling.groups import node_groups
from graphprune.errors import ShrinkError, ShrinkWarning
from graphprune.shrink import norms
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.trace.model import trace

TOKENS = torch.arange(22).reshape(2, 11) % 29


def widths(groups, *of):
    """A plan that halves the width of the heads whose members' layers are called one of `of`."""
    return Plan(
        {
            name: range(group.size // 2)
            for name, group in groups.items()
            if group.kind == "head_dim" and any(m.parameter.split(".")[-2] in of for m in group.members)
        }
    )


class ScaledByWidth(nn.Module):
    """Attention that takes its scale from the width that its queries happen to have."""

    def __init__(self, outward: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.classes = nn.Embedding(29, 48), nn.Linear(48, 5)
        self.q, self.k, self.v, self.o = (nn.Linear(48, 48) for _ in range(4))
        for layer in (self.table, self.q, self.k):
            nn.init.normal_(layer.weight, std=0.02)
        with torch.no_grad():
            self.o.weight.mul_(outward)

    def forward(self, ids):
        x = self.table(ids)
        q, k, v = (layer(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.classes(x + self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1)))


@pytest.mark.parametrize(
    ("outward", "dtype"), [(0.1, torch.float64), (0.1, torch.float32), (0.0, torch.float32)]
)
def test_a_scale_that_follows_the_width_is_seen_however_small_its_effect(outward, dtype):
    """With zeros behind it, as a fresh layer may have, it has no effect at all, and would have one after training."""
    model, inputs = ScaledByWidth(outward).to(dtype).eval(), {"ids": TOKENS}
    groups = node_groups(trace(model, inputs))
    plan = widths(groups, "q")
    assert plan
    with pytest.warns(ShrinkWarning, match="own code does not follow"):
        small = shrink(model, groups, plan)
    reference = zeroed(model, groups, plan)
    with torch.no_grad():
        for grown in (1, 15):
            for net in (small, reference):
                for layer in (net.q, net.k):
                    layer.weight.mul_(grown)
                net.o.weight.copy_(torch.eye(48))
            torch.testing.assert_close(small(**inputs), reference(**inputs), atol=1e-6, rtol=0)


def test_a_fresh_deberta_whose_heads_lose_width_is_returned_as_its_graph():
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=29,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=40,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_position_embeddings=32,
    )
    model, inputs = DebertaV2Model(config).double().eval(), {"input_ids": TOKENS}
    groups = node_groups(trace(model, inputs))
    plan = widths(groups, "query_proj")
    assert plan
    with pytest.warns(ShrinkWarning):
        small = shrink(model, groups, plan)
    with torch.no_grad():
        ours, expected = small(**inputs)[0], zeroed(model, groups, plan)(**inputs)[0]
        assert float((expected - model(**inputs)[0]).abs().max()) > 1e-5
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


class HeldInFloat32(nn.Module):
    """A table that is no buffer stays in float32, whatever the module is converted to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 3)
        self.table = [torch.randn(3, 3)]

    def forward(self, x):
        return nn.functional.linear(self.down(torch.tanh(self.up(x))), self.table[0])


def test_a_module_that_cannot_run_in_float64_is_compared_as_it_is():
    model, inputs = HeldInFloat32(), {"x": torch.randn(5, 4)}
    groups = node_groups(trace(model, inputs))
    (name,) = [group.name for group in groups.prunable() if group.size == 9]
    small = shrink(model, groups, Plan({name: [2, 5]}), form="module")
    assert small.up.weight.shape == (7, 4)
    assert small.up.weight.dtype is torch.float32


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x))) * (1 + torch.rand(3))


def test_a_module_that_is_not_what_was_traced_is_refused_with_that_reason():
    model, inputs = Drawn(), {"x": torch.randn(5, 4)}
    groups = node_groups(trace(model, inputs))
    (name,) = [group.name for group in groups.prunable() if group.size == 9]
    with pytest.raises(ShrinkError, match="even before, it is not what was traced"):
        shrink(model, groups, Plan({name: [2, 5]}), form="module")


def vera():
    from peft import VeraConfig, get_peft_model

    base = ARCHITECTURES["llama, multi-head"].build()
    return get_peft_model(base, VeraConfig(r=6, target_modules=["q_proj", "up_proj"])).eval()


def test_hidden_units_of_vera_go_and_the_layers_have_their_names():
    """Its forward reaches the layers through a slice of their list."""
    model, inputs = vera(), ARCHITECTURES["llama, multi-head"].inputs()
    groups = node_groups(trace(model, inputs))
    modules = dict(model.named_modules(remove_duplicate=False))
    assert {operator.module for operator in groups.graph.operators} <= set(modules)
    plan = Plan({group.name: [3] for group in groups.prunable() if group.kind == "hidden"})
    assert plan
    small = shrink(model, groups, plan)
    graph = shrink(model, groups, plan, form="graph")
    with torch.no_grad():
        expected = zeroed(model, groups, plan)(**inputs).logits
        for net in (small, graph):
            torch.testing.assert_close(net(**inputs).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_norm_in_no_module_of_its_name_falls_back_to_the_graph(monkeypatch):
    model, inputs = vera(), ARCHITECTURES["llama, multi-head"].inputs()
    groups = node_groups(trace(model, inputs))
    plan = Plan({group.name: [3] for group in groups.prunable() if group.kind == "hidden"})
    real = norms._norms

    def lost(*arguments):
        for norm in real(*arguments):
            yield norms._Norm("model.no.such", norm.ratio, norm.eps, norm.axis, norm.from_one)

    monkeypatch.setattr(norms, "_norms", lost)
    with pytest.warns(ShrinkWarning, match=r"no module of that name"):
        assert isinstance(shrink(model, groups, plan), torch.fx.GraphModule)
