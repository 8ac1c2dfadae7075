"""Costs are what one counts on the model that surgery really makes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import randomized, tiny_llama, traced
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graphprune.errors import BudgetError, RecipeError
from graphprune.prune.costs import Measured, bits_by_use, cost, cost_named
from graphprune.prune.polynomial import Polynomial
from graphprune.shrink.model import shrink

SEQUENCE = 13
COSTS = ("parameters", "macs", "kv_bytes", "bytes")


def gpt2():
    """Fused query, key and value in a Conv1D; biases; learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=67, n_positions=64, attn_implementation="eager"
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return traced(randomized(GPT2LMHeadModel(config), seed=3))


@pytest.fixture(scope="module")
def eager():
    return traced(tiny_llama(attn_implementation="eager"))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def own(request, eager):
    return eager if request.param == "llama" else gpt2()


def measured_of(own, **options):
    return Measured(own.groups, set(dict(own.model.named_parameters())), sequence=SEQUENCE, **options)


def costs_of(own, names, **options):
    return {name: cost_named(name, measured_of(own, **options), names) for name in COSTS}


def prunable(own, *kinds):
    return [g.name for g in own.groups.values() if g.prunable and (not kinds or g.kind in kinds)]


def count_macs(model) -> float:
    """What torch counts when a sequence goes through, for each of its tokens."""
    ids = torch.arange(SEQUENCE)[None] % 60
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops() / 2 / SEQUENCE


def count_cache(model) -> float:
    """Bytes that the model's own cache grows by with a token, in bfloat16."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    return 2 * numbers / 5


@settings(max_examples=3)
@given(st.data())
def test_every_cost_is_that_of_the_shrunk_model(own, data):
    names = prunable(own, "ffn", "attention_heads")
    bits = {name: 4.5 for name, p in own.model.named_parameters() if p.dim() == 2}
    functions = costs_of(own, names, bits=bits)
    kept = {name: data.draw(st.integers(1, own.groups[name].size), label=name) for name in names}
    plan = {name: range(count, own.groups[name].size) for name, count in kept.items()}
    small = shrink(own.model, own.groups, plan, own.inputs, form="module")
    sizes = {name: p.numel() for name, p in small.named_parameters()}
    assert functions["parameters"](kept) == sum(sizes.values())
    assert functions["bytes"](kept) == sum(bits.get(name, 32) / 8 * size for name, size in sizes.items())
    assert functions["macs"](kept) == count_macs(small)
    assert functions["kv_bytes"](kept) == count_cache(small)


@settings(max_examples=4)
@given(st.data())
def test_parameters_are_exact_where_kinds_share_weights(llama, data):
    """Heads and their widths, hidden units and all others: costs that are products of numbers of units."""
    names = prunable(llama)
    kept = {name: data.draw(st.integers(1, llama.groups[name].size), label=name) for name in names}
    plan = {name: range(count, llama.groups[name].size) for name, count in kept.items()}
    small = shrink(llama.model, llama.groups, plan, llama.inputs, form="graph")
    count = sum(p.numel() for p in small.parameters())
    assert cost_named("parameters", measured_of(llama), names)(kept) == count


def test_fused_attention_costs_what_its_products_cost(llama, eager):
    kept = dict.fromkeys(prunable(llama, "attention_heads"), 1)
    for name in ("macs", "kv_bytes"):
        ours, theirs = (costs_of(own, prunable(own))[name] for own in (llama, eager))
        assert ours() == theirs()
        assert ours(kept) == theirs(kept) < theirs()


def test_attention_grows_with_the_sequence_and_nothing_else_does(llama):
    names = prunable(llama, "attention_heads")
    short, long = (
        cost_named("macs", Measured(llama.groups, dict(llama.model.named_parameters()), sequence=s), names)
        for s in (10, 20)
    )
    heads, width, layers = 4, 8, 2
    assert long() - short() == 10 * heads * 2 * width * layers


@settings(max_examples=30)
@given(st.data())
def test_more_removed_never_costs_more(llama, data):
    names = prunable(llama)
    kept = {name: data.draw(st.integers(1, llama.groups[name].size), label=name) for name in names}
    fewer = {name: data.draw(st.integers(1, count), label=name) for name, count in kept.items()}
    for function in costs_of(llama, names).values():
        assert 0 < function(fewer) <= function(kept) <= function()


def test_adapters_cost_nothing(adapted, llama):
    counted = {name for name, _ in adapted.model.named_parameters() if "lora_" not in name}
    names = [name for name in prunable(adapted) if adapted.groups[name].kind != "lora_rank"]
    for name in COSTS:
        theirs = cost_named(name, measured_of(llama), prunable(llama))
        ours = cost_named(name, Measured(adapted.groups, counted, sequence=SEQUENCE), names)
        assert ours() == theirs()
        kept = {g: 1 for g in names if adapted.groups[g].kind == "ffn"}
        same = dict.fromkeys(prunable(llama, "ffn"), 1)
        assert ours(kept) == theirs(same)


def test_arrays_of_numbers_are_counted_at_once(llama):
    names = prunable(llama, "ffn")
    function = cost_named("macs", measured_of(llama), names)
    many = {name: torch.arange(1, 9).numpy() for name in names}
    assert function(many).tolist() == [function(dict.fromkeys(names, k)) for k in range(1, 9)]


def test_bits_are_of_matrices_and_of_tables(llama):
    counted = set(dict(llama.model.named_parameters()))
    bits = bits_by_use(llama.groups, counted, matrices=4.5, tables=8.5)
    assert bits["model.embed_tokens.weight"] == 8.5  # it is the head too
    assert bits["model.layers.0.mlp.up_proj.weight"] == 4.5
    assert not any("norm" in name for name in bits)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, pictures):
        return self.second(self.first(pictures).relu().mean((2, 3)))


def test_convolutions_count_their_windows_and_cache_nothing():
    from graphprune.coupling.groups import node_groups
    from graphprune.trace.model import trace

    model = Perceptron().eval()
    groups = node_groups(trace(model, {"pictures": torch.randn(2, 3, 9, 9)}))
    measured = Measured(groups, set(dict(model.named_parameters())))
    names = [group.name for group in groups.values() if group.prunable]
    kept = dict.fromkeys(names, 4)
    assert names
    assert cost_named("macs", measured, names)(kept) == 7 * 7 * 4 * 3 * 9 + 4 * 5
    with pytest.raises(BudgetError, match="keeps no keys and values"):
        cost_named("kv_bytes", measured, names)


def test_a_cost_of_ones_own_and_one_that_is_not_there(llama):
    @cost("layers")
    def layers(measured, sizes):
        return Polynomial.constant(2)

    assert cost_named("layers", measured_of(llama), [])() == 2
    with pytest.raises(RecipeError, match="there is no cost 'parameter'\n  → did you mean 'parameters'"):
        cost_named("parameter", measured_of(llama), [])


@given(st.dictionaries(st.sampled_from("abc"), st.integers(-3, 3), min_size=3), st.data())
def test_polynomials_calculate_as_numbers_do(values, data):
    def tree(depth):
        if depth == 0 or data.draw(st.booleans()):
            name = data.draw(st.sampled_from("abc"))
            return data.draw(
                st.sampled_from([(Polynomial.variable(name), values[name]), (Polynomial.constant(2), 2)])
            )
        (left, x), (right, y) = tree(depth - 1), tree(depth - 1)
        return data.draw(st.sampled_from([(left + right, x + y), (left * right, x * y)]))

    polynomial, number = tree(3)
    assert polynomial(values) == number
    assert polynomial.fixed({"a": values["a"]})(values) == number
    assert polynomial.renamed({"a": "b"})(values) == polynomial({**values, "a": values["b"]})
    assert math.isfinite(number)
