"""Surgery where a module's own code does not follow: the traced graph; optimizer state; what is kept of a model."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn
from zeroed import zeroed

from graphprune.certify.certificate import certify
from graphprune.coupling.groups import node_groups
from graphprune.errors import ShrinkError, ShrinkWarning
from graphprune.shrink.model import shrink
from graphprune.shrink.optimizer import shrink_optimizer
from graphprune.shrink.plan import Plan
from graphprune.shrink.weights import zero_weight
from graphprune.trace.model import trace


def of_kind(groups, kind):
    return [name for name, group in groups.items() if group.kind == kind and group.prunable]


@pytest.fixture
def rotary(llama):
    """A plan that takes other rotary pairs from each layer, which one shared buffer cannot follow."""
    pairs = [
        n
        for n in llama.of_kind("head_dim")
        if any("inv_freq" in m.parameter for m in llama.groups[n].members)
    ]
    return llama, Plan({name: [number] for number, name in enumerate(pairs)})


def test_layers_that_keep_different_rotary_pairs_come_back_as_a_graph_that_says_why(rotary):
    llama, plan = rotary
    with pytest.warns(ShrinkWarning, match="own code does not follow"):
        small = shrink(llama.model, llama.groups, plan)
    assert isinstance(small, torch.fx.GraphModule)
    assert "own code does not follow" in small.meta["why_a_graph"]
    with pytest.raises(ShrinkError, match="own code does not follow"):
        shrink(llama.model, llama.groups, plan, form="module")


def test_the_graph_computes_what_the_zeroed_model_does_at_other_sizes_too(rotary):
    llama, plan = rotary
    small = shrink(llama.model, llama.groups, plan, form="graph")
    reference = zeroed(llama.model, llama.groups, plan)
    for shape in ((2, 11), (3, 7)):
        inputs = {"input_ids": torch.arange(shape[0] * shape[1]).reshape(shape) % 60, "use_cache": False}
        with torch.no_grad():
            ours, theirs = small(**inputs).logits, reference(**inputs).logits
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_graph_is_shrunk_again(rotary):
    """It holds selections of its own, beside those that the second surgery adds."""
    llama, plan = rotary
    once = shrink(llama.model, llama.groups, plan, form="graph")
    groups = node_groups(trace(once, llama.inputs))
    later = Plan({name: [0] for name in plan if groups[name].size > 1})
    assert later
    twice = shrink(once, groups, later, llama.inputs, form="graph")
    at_once = shrink(llama.model, llama.groups, plan.then(later, llama.groups), form="graph")
    with torch.no_grad():
        torch.testing.assert_close(twice(**llama.inputs).logits, at_once(**llama.inputs).logits)


def test_the_graph_trains_saves_loads_and_exports(rotary):
    llama, plan = rotary
    small = shrink(llama.model, llama.groups, plan, form="graph").train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    before = small(**llama.inputs).logits.square().mean()
    before.backward()
    optimizer.step()
    after = small(**llama.inputs).logits
    assert float(after.square().mean()) < float(before)
    other = shrink(llama.model, llama.groups, plan, form="graph")
    other.load_state_dict(small.state_dict())
    torch.testing.assert_close(other(**llama.inputs).logits, after)
    again = trace(small.eval(), llama.inputs)
    assert certify(small, node_groups(again), llama.inputs).ok


def test_keeping_all_is_bitwise_nothing_in_both_forms(adapted):
    with torch.no_grad():
        expected = adapted.model(**adapted.inputs).logits
        for form in ("module", "graph"):
            small = shrink(adapted.model, adapted.groups, Plan({}), adapted.inputs, form=form)
            assert torch.equal(small(**adapted.inputs).logits, expected)


def test_tied_weights_stay_tied_in_the_graph(rotary):
    llama, plan = rotary
    small = shrink(llama.model, llama.groups, plan, form="graph")
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.lm_head.weight is not llama.model.lm_head.weight


def test_an_exported_program_is_shrunk_without_the_module(llama):
    groups = node_groups(trace(llama.groups.graph.program))
    assert groups.rows() == llama.groups.rows()
    plan = Plan({of_kind(groups, "ffn")[0]: range(10)})
    small = shrink(groups.graph.program, groups, plan)
    with torch.no_grad():
        torch.testing.assert_close(
            small(**llama.inputs).logits,
            zeroed(llama.model, llama.groups, plan)(**llama.inputs).logits,
            atol=1e-5,
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama, grouped-query", "query_heads"),
        ("gpt2", "attention_heads"),
        ("phi3", "attention_heads"),
        ("bert", "head_dim"),
        ("mixtral", "expert"),
        ("gemma3", "hidden"),
        ("grouped convolutions", "other"),
        ("u-net", "other"),
    ],
)
def test_a_modules_own_attributes_follow(name, kind):
    """Head counts, configuration, experts, channels, norms that add one to their weight."""
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    groups = node_groups(trace(model, inputs))
    plan = Plan({group: [0] for group in of_kind(groups, kind)})
    assert plan
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = shrink(model, groups, plan, inputs, form="module")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        ours, graph = small(**inputs), shrink(model, groups, plan, inputs, form="graph")(**inputs)
    ours, graph = (out if isinstance(out, torch.Tensor) else out[0] for out in (ours, graph))
    torch.testing.assert_close(ours, graph, atol=2e-5, rtol=1e-4)


def test_at_least_as_many_experts_stay_as_are_picked():
    model, inputs = ARCHITECTURES["mixtral"].build(), ARCHITECTURES["mixtral"].inputs()
    groups = node_groups(trace(model, inputs))
    name = of_kind(groups, "expert")[0]
    assert groups[name].minimum == 2
    assert {m.parameter.split(".")[-2] for m in groups[name].members} == {"gate", "experts"}
    with pytest.raises(ShrinkError, match="leaves 1 of 5"):
        shrink(model, groups, Plan({name: range(4)}), inputs)
    small = shrink(model, groups, Plan({name: range(3)}), inputs)
    assert small.model.layers[0].mlp.experts.down_proj.shape[0] == 2


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_as_if_the_model_had_always_been_small(kind):
    """Steps on the zeroed model and on the small one stay the same: their units never had a gradient."""
    torch.manual_seed(0)
    options = {"lr": 0.05, **({"momentum": 0.9} if kind is torch.optim.SGD else {"weight_decay": 0.0})}
    x, y = torch.randn(16, 4), torch.randn(16, 3)
    model = Stacked()
    groups = node_groups(trace(model, {"x": x}))
    plan = Plan({of_kind(groups, "ffn")[0]: [1, 4]})
    big = zeroed(model, groups, plan)

    def step(module, optimizer):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()

    first = kind(big.parameters(), **options)
    for _ in range(3):
        step(big, first)
        with torch.no_grad():  # a unit that is gone stays at zero
            for name, parameter in big.named_parameters():
                parameter.copy_(zero_weight(name, parameter, groups, plan.kept(groups)))
    small = shrink(big, groups, plan, {"x": x})
    second = shrink_optimizer(first, big, small, groups, plan)
    assert all(
        p.shape == q.shape for p, q in zip(second.param_groups[0]["params"], small.parameters(), strict=True)
    )
    step(big, first)
    step(small, second)
    kept = np.setdiff1d(np.arange(9), [1, 4])
    torch.testing.assert_close(small.up.weight, big.up.weight[kept])
    torch.testing.assert_close(small.down.weight, big.down.weight[:, kept])
    second.load_state_dict(second.state_dict())
    torch.save(second.state_dict(), io.BytesIO())


def test_an_optimizer_of_another_model_is_refused():
    model, inputs = Stacked(), {"x": torch.randn(2, 4)}
    groups = node_groups(trace(model, inputs))
    small = shrink(model, groups, Plan({}), inputs)
    with pytest.raises(ShrinkError, match="lacks"):
        shrink_optimizer(torch.optim.SGD(Stacked().parameters(), lr=0.1), model, small, groups, Plan({}))


@pytest.mark.parametrize("kind", ["ffn", "attention_heads"])
@pytest.mark.parametrize("form", ["graph", "auto"])
def test_a_whole_block_goes_only_on_purpose(llama, kind, form):
    name = of_kind(llama.groups, kind)[0]
    units = range(llama.groups[name].size)
    with pytest.raises(ShrinkError, match="on purpose"):
        shrink(llama.model, llama.groups, Plan({name: units}), form=form)
    plan = Plan({name: units}, whole=True)
    small = shrink(llama.model, llama.groups, plan, form=form)
    with torch.no_grad():
        expected = zeroed(llama.model, llama.groups, plan)(**llama.inputs).logits
        torch.testing.assert_close(small(**llama.inputs).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_module_shrunk_alike_in_all_layers_saves_and_loads(llama, tmp_path):
    plan = Plan(
        {name: [0, 3] for name in llama.of_kind("ffn")} | {n: [0] for n in llama.of_kind("query_heads")}
    )
    small = shrink(llama.model, llama.groups, plan, form="module")
    assert llama.model.config.intermediate_size == 48
    small.save_pretrained(tmp_path)
    again = type(llama.model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**llama.inputs).logits, small(**llama.inputs).logits)


def test_widths_that_differ_between_layers_leave_the_configuration_alone(llama):
    plan = Plan({llama.of_kind("ffn")[0]: [0, 3]})
    assert shrink(llama.model, llama.groups, plan, form="module").config.intermediate_size == 48


class Attending(nn.Module):
    """torch's own attention, which also returns the mean of its weights over heads, for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.attention, self.out = (
            nn.Linear(5, 12),
            nn.MultiheadAttention(12, 3, batch_first=True),
            nn.Linear(12, 2),
        )

    def forward(self, x):
        x = self.inward(x)
        return self.out(self.attention(x, x, x, need_weights=True)[0])


def test_what_is_computed_for_nobody_does_not_matter():
    torch.manual_seed(0)
    model, inputs = Attending().eval(), {"x": torch.randn(2, 7, 5)}
    groups = node_groups(trace(model, inputs))
    assert {group.kind for group in groups.prunable()} >= {"attention_heads", "head_dim"}
    certify(model, groups, inputs).raise_if_failed()
    plan = Plan({group.name: [0] for group in groups.prunable()})
    small = shrink(model, groups, plan, inputs, form="graph")
    with torch.no_grad():
        torch.testing.assert_close(
            small(**inputs), zeroed(model, groups, plan)(**inputs), atol=1e-5, rtol=1e-4
        )


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = torch.nn.utils.parametrizations.weight_norm
        self.up, self.down = norm(nn.Linear(5, 9)), norm(nn.Linear(9, 3))

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_weight_normalisation_follows():
    torch.manual_seed(0)
    model, inputs = WeightNormed().eval(), {"x": torch.randn(4, 5)}
    groups = node_groups(trace(model, inputs))
    assert [group.size for group in groups.prunable()] == [9]
    certify(model, groups, inputs).raise_if_failed()


@pytest.mark.parametrize("form", ["module", "graph"])
def test_a_model_without_weights_is_shrunk_too(llama, form):
    """What a plan leaves of a model that does not fit into memory can be told without it."""
    with torch.device("meta"):
        empty = type(llama.model)(llama.model.config).eval()
    groups = node_groups(trace(empty, llama.inputs))
    plan = Plan({of_kind(groups, "ffn")[0]: range(8), of_kind(groups, "attention_heads")[0]: [1]})
    small = shrink(empty, groups, plan, llama.inputs, form=form)
    real = shrink(llama.model, llama.groups, plan, llama.inputs, form=form)
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert all(parameter.is_meta for parameter in small.parameters())


@pytest.mark.parametrize(("units", "saved"), [(range(8), True), ([3, 5], False)])
def test_a_residual_width_is_saved_with_its_eps_or_not_at_all(llama, units, saved, tmp_path):
    """30 is no multiple of four heads, which the configuration's class refuses; then it stays as it was."""
    plan = Plan(dict.fromkeys(llama.of_kind("hidden"), units))
    small = shrink(llama.model, llama.groups, plan, form="module")
    if not saved:
        assert small.config.hidden_size == 32
        return
    small.save_pretrained(tmp_path)
    again = type(llama.model).from_pretrained(tmp_path).eval()
    assert again.config.rms_norm_eps == pytest.approx(llama.model.config.rms_norm_eps * 32 / 24)
    with torch.no_grad():
        torch.testing.assert_close(again(**llama.inputs).logits, small(**llama.inputs).logits)
