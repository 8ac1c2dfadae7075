"""An engine that is broken on purpose is caught by its certificate, on generated networks and on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from examined_networks import Examined, examine, over_networks, units_of
from generated_networks import Network
from tiny_models import randomized

from graphprune.certify import certificate as certificate_module
from graphprune.certify.certificate import Certificate, certify
from graphprune.coupling import analysis
from graphprune.coupling.algebra import Algebra, Axes
from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.shrink import resize
from graphprune.trace.graph import Operator
from graphprune.trace.model import trace

Rule = Callable[[Operator, Algebra], Any]


def uncoupled(operator: Operator, algebra: Algebra) -> Axes:
    """Take the layout of the first operand that is as large as the result, and leave the others alone."""
    (output,) = operator.outputs
    assert output is not None
    like = next((value for value in operator.inputs if value.shape == output.shape), None)
    return list(algebra[like]) if like else algebra.broadcast(operator.inputs, output.shape)


def reversed_segments(operator: Operator, algebra: Algebra) -> Axes:
    """Lay the operands of a concatenation end to end the other way round."""
    values = operator["tensors"]
    dim = operator["dim"] % len(values[0].shape)
    axes = list(algebra[values[0]])
    axes[dim] = algebra.concat([algebra[value][dim] for value in reversed(values)])
    return axes


def detached_parts(operator: Operator, algebra: Algebra) -> tuple[Axes, ...]:
    """Split an axis into parts that have nothing to do with it."""
    source, outputs = operator["self"], [value for value in operator.outputs if value is not None]
    dim = operator["dim"] % len(source.shape)
    axes = algebra[source]
    return tuple([*axes[:dim], *algebra.fresh([value.shape[dim]]), *axes[dim + 1 :]] for value in outputs)


def reversed_factors(operator: Operator, algebra: Algebra) -> Axes:
    """Split the last axis into two factors, the inner one first."""
    source, (output,) = operator.inputs[0], operator.outputs
    assert output is not None
    if (
        len(output.shape) != len(source.shape) + 1
        or output.shape[: len(source.shape) - 1] != source.shape[:-1]
    ):
        return algebra.reshape(algebra[source], source.shape, output.shape)
    outer, inner = algebra.fresh(output.shape[-2:])
    algebra.same(algebra.solver.product([inner, outer]), algebra[source][-1])
    return [*algebra[source][:-1], outer, inner]


BROKEN: dict[str, tuple[tuple[str, ...], Rule]] = {
    "a product that does not couple": (("mul",), uncoupled),
    "a sum that does not couple": (("add",), uncoupled),
    "segments in reversed order": (("cat",), reversed_segments),
    "parts that are detached": (("split", "split_with_sizes", "chunk"), detached_parts),
    "factors in reversed order": (("view",), reversed_factors),
}


def operator_of(target: str) -> str:
    """Return ``view`` for ``aten.view.default``."""
    return target.removeprefix("aten.").split(".")[0]


@contextmanager
def broken(name: str) -> Iterator[None]:
    operators, rule = BROKEN[name]
    real = analysis.rule_for
    with mock.patch.object(
        analysis, "rule_for", lambda target: rule if operator_of(target) in operators else real(target)
    ):
        yield


def certified(examined: Examined, groups: NodeGroups) -> Certificate:
    return certify(examined.model, groups, examined.inputs, seed=examined.network.seed)


def wrong_units(examined: Examined, groups: NodeGroups) -> set[Any]:
    """Return units that can be moved by `groups`, and not by the right ones."""
    return set(units_of(groups, lambda g: g.permutable)) - set(
        units_of(examined.groups, lambda g: g.permutable)
    )


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_caught_on_generated_networks(name):
    """Wherever it makes units that the right rule does not."""
    tried: set[Network] = set()

    @over_networks(share=5)
    def each(network):
        examined = examine(network)
        with broken(name):
            groups = node_groups(examined.groups.graph)
        if wrong_units(examined, groups):
            tried.add(network)
            assert not certified(examined, groups).ok

    each()
    assert len(tried) >= 3


SETTINGS = {
    "vocab_size": 61,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SETTINGS),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SETTINGS),
    "gpt-neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {k: v for k, v in SETTINGS.items() if k != "num_key_value_heads"} | {"hidden_size": 48},
    ),
}
# Which of them a model's operators can show.
VISIBLE = {
    "llama": ["a product that does not couple", "a sum that does not couple", "factors in reversed order"],
    "phi3": ["a sum that does not couple", "parts that are detached", "factors in reversed order"],
    "gpt-neox": ["parts that are detached", "factors in reversed order"],
}
INPUTS = {"input_ids": torch.arange(20).reshape(2, 10) + 3, "use_cache": False}


@pytest.fixture(scope="module")
def tiny() -> dict[str, tuple[Any, NodeGroups]]:
    """Each tiny model with its groups; not to be changed."""
    made = {}
    for name, (config, model_class, config_settings) in MODELS.items():
        torch.manual_seed(0)
        model = randomized(
            getattr(transformers, model_class)(getattr(transformers, config)(**config_settings))
        )
        made[name] = (model, node_groups(trace(model, INPUTS, dynamic=False)))
    return made


@pytest.mark.parametrize(
    ("model_name", "rule"), [(m, rule) for m, rules in VISIBLE.items() for rule in rules]
)
def test_a_broken_rule_is_caught_on_a_tiny_model(tiny, model_name, rule):
    model, groups = tiny[model_name]
    with broken(rule):
        wrong = node_groups(groups.graph)
    assert not certify(model, wrong, INPUTS).ok


@pytest.mark.parametrize("model_name", MODELS)
def test_a_member_dropped_is_caught_on_a_tiny_model(tiny, model_name):
    """Whichever it is: every parameter's axis that is not cut along is missed by the others."""
    model, groups = tiny[model_name]
    prunable = [group for group in groups.values() if group.prunable]
    generator = np.random.default_rng(0)
    for group in generator.permutation(np.array(prunable, dtype=object))[:3]:
        members = [member for member in group.members if member.role == "parameter"]
        member = members[int(generator.integers(len(members)))]
        with dropped(member.parameter, member.axis):
            result = certify(model, groups, INPUTS)
        assert not result.ok
        assert group.name in result.failures


@contextmanager
def dropped(parameter: str, axis: int) -> Iterator[None]:
    """Leave one axis of one parameter as it is, whatever the groups say."""
    real = certificate_module.select_weight

    def forgetful(name, tensor, groups, kept):
        smaller = real(name, tensor, groups, kept)
        if groups.graph.tied.get(name, name) != parameter:
            return smaller
        others = range(tensor.dim())
        for other in others:
            if other != axis and smaller.shape[other] != tensor.shape[other]:
                return smaller.new_zeros(())  # does not fit anywhere
        return tensor

    with mock.patch.object(certificate_module, "select_weight", forgetful):
        yield


@over_networks(share=5)
def test_a_member_dropped_is_caught_on_generated_networks(network):
    examined = examine(network)
    generator = examined.generator()
    read = [group for group in examined.prunable if group.consumers]
    if not read:
        return
    group = read[int(generator.integers(len(read)))]
    members = [member for member in group.members if member.role == "parameter"]
    member = members[int(generator.integers(len(members)))]
    with dropped(member.parameter, member.axis):
        assert not certified(examined, examined.groups).ok


@pytest.mark.parametrize(
    "operator", ["view", "mean", "slice", "scaled_dot_product_attention", "split_with_sizes"]
)
def test_a_size_left_stale_is_caught_on_generated_networks(operator):
    """Of one operator, every size that is written into the program stays what it was."""
    caught: set[Network] = set()
    real = resize.resizer_for

    @over_networks(share=5)
    def each(network):
        examined = examine(network)
        targets = {operator_of(call.target) for call in examined.groups.graph.operators}
        if operator not in targets or not examined.prunable:
            return
        with mock.patch.object(
            resize, "resizer_for", lambda target: None if operator_of(target) == operator else real(target)
        ):
            if not certified(examined, examined.groups).ok:
                caught.add(network)

    each()
    assert caught
