from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import traced
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from zeroed import zeroed

from graphprune.coupling.groups import node_groups
from graphprune.errors import RecipeError, ShrinkError
from graphprune.shrink.config import fit_config
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.shrink.program import Program
from graphprune.shrink.resize import resize
from graphprune.shrink.weights import named_weights, select_weight
from graphprune.trace.model import trace

RESHAPABLE = ("ffn", "attention_heads", "query_heads", "lora_rank")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def uniform(traced, **removed):
    """Remove the first units of every group of each kind given."""
    return Plan({name: range(n) for kind, n in removed.items() for name in traced.of_kind(kind)})


def test_an_empty_plan_changes_no_bit(adapted):
    small = shrink(adapted.model, adapted.groups, Plan({}), adapted.inputs)
    ours, theirs = small.state_dict(), adapted.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert small is not adapted.model


@settings(max_examples=15)
@given(st.data())
def test_removing_is_zeroing_for_any_plan(adapted, data):
    removed = {}
    for name, group in adapted.groups.items():
        if group.kind in RESHAPABLE and group.kind != "attention_heads":
            units = data.draw(st.sets(st.integers(0, group.size - 1), max_size=group.size - 1), label=name)
            removed[name] = sorted(units)
    plan = Plan(removed)
    small = shrink(adapted.model, adapted.groups, plan, adapted.inputs)
    torch.testing.assert_close(
        logits(small, adapted.inputs),
        logits(zeroed(adapted.model, adapted.groups, plan), adapted.inputs),
        atol=2e-5,
        rtol=1e-4,
    )


def test_whole_key_heads_go_with_their_query_heads(llama):
    plan = uniform(llama, attention_heads=1)
    small = shrink(llama.model, llama.groups, plan, llama.inputs)
    layer = small.model.layers[0].self_attn
    assert [m.weight.shape[0] for m in (layer.q_proj, layer.k_proj, layer.v_proj)] == [16, 8, 8]
    assert (layer.o_proj.in_features, layer.q_proj.out_features) == (16, 16)
    torch.testing.assert_close(
        logits(small, llama.inputs),
        logits(zeroed(llama.model, llama.groups, plan), llama.inputs),
        atol=1e-5,
        rtol=1e-4,
    )


def test_the_model_given_is_not_touched_and_flags_stay(adapted):
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    small = shrink(adapted.model, adapted.groups, uniform(adapted, ffn=8), adapted.inputs)
    after = adapted.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    flags = {name: parameter.requires_grad for name, parameter in adapted.model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == flags


def test_tied_weights_stay_tied(llama):
    small = shrink(llama.model, llama.groups, uniform(llama, ffn=8), llama.inputs)
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_merging_adapters_and_cutting_commute(adapted):
    plan = uniform(adapted, ffn=8, attention_heads=1)
    cut_then_merge = shrink(adapted.model, adapted.groups, plan, adapted.inputs).merge_and_unload()
    merged = copy.deepcopy(adapted.model).merge_and_unload()
    groups = node_groups(trace(merged, adapted.inputs))
    assert len(groups) < len(adapted.groups)
    by_members = {tuple(m.parameter for m in g.members): name for name, g in groups.items()}
    renamed = {}
    for name, units in plan.items():
        own = [
            m.parameter.removeprefix("base_model.model.").replace(".base_layer", "")
            for m in adapted.groups[name].members
        ]
        renamed[by_members[tuple(p for p in own if "lora" not in p)]] = units
    merge_then_cut = shrink(merged, groups, Plan(renamed), adapted.inputs)
    torch.testing.assert_close(
        logits(cut_then_merge, adapted.inputs), logits(merge_then_cut, adapted.inputs), atol=1e-5, rtol=1e-4
    )


def test_a_width_that_a_norm_divides_by_is_made_up_for_by_its_weight_and_eps(llama):
    plan = uniform(llama, hidden=8)
    small = shrink(llama.model, llama.groups, plan, llama.inputs, form="module")
    before, after = llama.model.model.layers[0].input_layernorm, small.model.layers[0].input_layernorm
    assert after.variance_epsilon == pytest.approx(before.variance_epsilon * 32 / 24)
    torch.testing.assert_close(after.weight, before.weight[8:] * (32 / 24) ** 0.5)
    kept = plan.kept(llama.groups)
    reference = resize(Program(llama.groups.graph.program), llama.groups, kept)
    weights = {n: select_weight(n, t.detach(), llama.groups, kept) for n, t in named_weights(llama.model)}
    torch.testing.assert_close(
        logits(small, llama.inputs), reference(weights, llama.inputs)[0], atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"{ffn}": [48]}, "which has 48"),
        ({"{ffn}": range(48)}, "leaves 0 of 48 units"),
        ({"{vocabulary}": [0]}, "cannot be pruned"),
    ],
)
def test_plans_that_do_not_fit_are_refused(llama, removed, message):
    names = {f"{{{kind}}}": llama.of_kind(kind)[0] for kind in ("ffn", "vocabulary")}
    plan = Plan({names[key]: units for key, units in removed.items()})
    with pytest.raises(ShrinkError, match=message):
        shrink(llama.model, llama.groups, plan, llama.inputs)


@settings(max_examples=30)
@given(st.data())
def test_plans_compose_and_survive_json(llama, tmp_path_factory, data):
    name = llama.of_kind("ffn")[0]
    size = llama.groups[name].size
    first = Plan({name: data.draw(st.sets(st.integers(0, size - 1), max_size=size - 2))})
    left = size - len(first.get(name, ()))
    second = Plan({name: data.draw(st.sets(st.integers(0, left - 1), max_size=left - 1))})
    both = first.then(second, llama.groups)
    kept_first = first.kept(llama.groups).get(name, np.arange(size))
    expected = np.delete(kept_first, list(second.get(name, ())))
    assert both.kept(llama.groups).get(name, np.arange(size)).tolist() == expected.tolist()
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    both.save(path, asked=0.2)
    assert Plan.load(path) == both


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text('{"schema": "other"}')
    with pytest.raises(RecipeError, match="is not a plan"):
        Plan.load(tmp_path / "plan.json")


def test_the_configuration_that_builds_the_smaller_model_is_found(adapted, llama):
    plan = uniform(adapted, ffn=16, attention_heads=1)
    small = shrink(adapted.model, adapted.groups, plan, adapted.inputs).merge_and_unload()
    config = fit_config(llama.model.config, small, adapted.groups, plan)
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (32, 2, 1)
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers) == (32, 8, 2)
    assert llama.model.config.intermediate_size == 48


def test_fewer_heads_are_told_from_narrower_ones_of_the_same_shapes():
    """With as many heads as a head is wide, rotary tables alone say which of them went."""
    square = LlamaConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=16,
    )  # fmt: skip
    net = traced(LlamaForCausalLM(square).eval())
    plan = uniform(net, attention_heads=2)
    small = shrink(net.model, net.groups, plan, net.inputs)
    config = fit_config(square, small, net.groups, plan)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    plan = uniform(net, attention_heads=1)  # six heads
    small = shrink(net.model, net.groups, plan, net.inputs)
    with pytest.raises(ShrinkError, match=r"refuses .*hidden size \(64\) is not a multiple"):
        fit_config(square, small, net.groups, plan)


@pytest.mark.parametrize("kinds", [{"attention_heads": 1}, {"attention_heads": 1, "ffn": 10}])
def test_a_width_of_heads_that_the_class_divides_for_is_written_down(kinds):
    """Phi 3 keeps query, key and value in one matrix, whose rows six heads of two would fill as well."""
    config = Phi3Config(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=61, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    net = traced(Phi3ForCausalLM(config).eval())
    plan = uniform(net, **kinds)
    small = shrink(net.model, net.groups, plan, net.inputs, form="module")
    fitted = fit_config(config, small, net.groups, plan)
    assert fitted.head_dim == 4
    again = Phi3ForCausalLM(fitted).eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(**net.inputs).logits, small(**net.inputs).logits)


def test_a_width_of_heads_that_no_buffer_confirms_is_not_written_down():
    """Where buffers cannot tell two widths apart, weights of the right shapes do not prove one."""
    config = Phi3Config(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=61, pad_token_id=0,
    )  # fmt: skip
    net = traced(Phi3ForCausalLM(config).eval())
    plan = uniform(net, attention_heads=1)
    small = shrink(net.model, net.groups, plan, net.inputs, form="module")
    small.register_buffer("of_no_class", torch.zeros(3), persistent=False)
    with pytest.raises(ShrinkError, match="no setting of Phi3Config"):
        fit_config(config, small, net.groups, plan)


def test_as_many_layers_as_heads_stay_layers():
    """Twelve numbers of a configuration are two here; only those of heads make the smaller model."""
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=61, eos_token_id=2, sliding_window=None,
    )  # fmt: skip
    net = traced(MixtralForCausalLM(config).eval())
    plan = uniform(net, attention_heads=1, ffn=32)
    small = shrink(net.model, net.groups, plan, net.inputs, form="module")
    fitted = fit_config(config, small, net.groups, plan)
    assert (fitted.num_attention_heads, fitted.num_key_value_heads, fitted.head_dim) == (2, 1, 8)
    assert (fitted.intermediate_size, fitted.num_hidden_layers, fitted.eos_token_id) == (32, 2, 2)


def test_uneven_layers_have_no_stock_configuration(llama):
    plan = Plan({llama.of_kind("ffn")[0]: range(8)})
    small = shrink(llama.model, llama.groups, plan, llama.inputs)
    with pytest.raises(ShrinkError, match="no setting of LlamaConfig"):
        fit_config(llama.model.config, small, llama.groups, plan)


class Convolutions(nn.Module):
    """A depth-wise convolution and batch norm between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.depthwise, self.last = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.depthwise(torch.relu(self.norm(self.first(x))))))


def test_convolutions_are_cut_with_the_sizes_that_they_record():
    torch.manual_seed(0)
    model = Convolutions().eval()
    model.norm.running_var.uniform_(0.5, 2.0)
    inputs = {"x": torch.randn(2, 3, 9, 9)}
    groups = node_groups(trace(model, inputs))
    width = next(name for name, group in groups.items() if group.size == 8)
    small = shrink(model, groups, Plan({width: [0, 3, 7]}), inputs)
    assert (small.depthwise.groups, small.depthwise.in_channels, small.norm.num_features) == (5, 5, 5)
    assert small(**inputs).shape == model(**inputs).shape
