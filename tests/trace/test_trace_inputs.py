"""What may be given as example inputs, what a trace does without, and which sizes it leaves open."""

from __future__ import annotations

import traceback
import warnings

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from graphprune.coupling.groups import node_groups
from graphprune.errors import TraceError, TraceWarning
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.trace.model import trace

TOKENS = torch.arange(22).reshape(2, 11) % 60


def test_a_model_that_fills_a_cache_by_default_is_traced_without():
    model = tiny_llama()
    assert model.config.use_cache
    graph = trace(model, {"input_ids": TOKENS})
    assert [value.name for value in graph.inputs] == ["input_ids"]
    assert len(graph.outputs) == 1
    assert graph.operators == trace(model, {"input_ids": TOKENS, "use_cache": False}).operators
    groups = node_groups(graph)
    name = next(name for name, group in groups.items() if group.kind == "ffn")
    for form in ("module", "graph"):
        small = shrink(model, groups, Plan({name: [0]}), form=form)
        assert small(input_ids=TOKENS).logits.shape == (2, 11, 67)
    assert not model._forward_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_cache_that_is_asked_for_is_left_out_of_the_outputs():
    graph = trace(tiny_llama(), {"input_ids": TOKENS, "use_cache": True})
    assert [value.shape for value in graph.outputs] == [(2, 11, 67)]


def test_an_adapter_that_comes_as_a_cache_is_traced():
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    graph = trace(model.eval(), {"input_ids": TOKENS})
    assert any("prompt_encoder" in name for name in graph.weights)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, scale=None):
        return self.layer(x) if scale is None else self.layer(x) * scale


@pytest.mark.parametrize(
    "given", [torch.zeros(3, 6), (torch.zeros(3, 6),), [torch.zeros(3, 6)], {"x": torch.zeros(3, 6)}]
)
def test_a_tensor_or_the_first_arguments_in_order_are_named(given):
    model = Pair()
    graph = trace(model, given)
    assert [value.name for value in graph.inputs] == ["x"]


def test_two_arguments_in_order_are_named():
    graph = trace(Pair(), (torch.zeros(3, 6), torch.zeros(3, 1)))
    assert [value.name for value in graph.inputs] == ["x", "scale"]


class Wrapper(nn.Module):
    """Hands on whatever it is called with, as wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "given", "problem"),
    [
        (Pair(), {"y": torch.zeros(3, 6)}, "missing a required argument: 'x'"),
        (Pair(), {"x": torch.zeros(3, 6), "scales": 1.0}, "unexpected keyword argument 'scales'"),
        (Pair(), (torch.zeros(3, 6), None, None), "3 example inputs are given, and Pair's forward names 2"),
        (Pair(), 7, "keyword arguments by name, not a int"),
        (Pair(), {0: torch.zeros(3, 6)}, "keyword arguments by name"),
        (Wrapper(Pair()), torch.zeros(3, 6), "1 example inputs are given, and Wrapper's forward names 0"),
    ],
)
def test_example_inputs_that_do_not_fit_are_refused_with_what_is_wanted(model, given, problem):
    with pytest.raises(TraceError, match=problem) as caught:
        trace(model, given)
    assert "give the keyword arguments of its forward: {" in caught.value.remedy


def test_a_misspelt_name_is_told_and_no_traceback_of_the_exporter_stands_above_it():
    with pytest.raises(TraceError, match="does not name input_idz") as caught:
        trace(tiny_llama(), {"input_idz": TOKENS})
    shown = "".join(traceback.format_exception(caught.value))
    assert "torch/export" not in shown
    assert len(shown.splitlines()) < 25


def test_what_a_wrapper_hands_on_stays_open():
    model, inputs = Wrapper(tiny_llama()), {"input_ids": TOKENS}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        graph = trace(model, inputs)
    assert "forward" not in vars(model)
    (tokens,) = [node for node in graph.program.graph.nodes if node.name == "input_ids"]
    assert not any(isinstance(size, int) for size in tokens.meta["val"].shape)
    groups = node_groups(graph)
    pairs = [n for n, g in groups.items() if g.kind == "head_dim" and g.prunable]
    small = shrink(model, groups, Plan({pairs[0]: [0]}), form="graph")
    for shape in ((3, 5), (1, 4)):
        assert small(input_ids=torch.ones(shape, dtype=torch.long)).logits.shape == (*shape, 67)


class Strict(nn.Module):
    """Its code asks for three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        if x.shape[0] != 3:
            raise ValueError("only three rows")
        return self.layer(x)


def test_a_model_that_fixes_its_sizes_says_so():
    with pytest.warns(
        TraceWarning, match=r"Strict is traced for the example's sizes alone \(x axis 0 is 3\)"
    ):
        trace(Strict(), {"x": torch.zeros(3, 6)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        trace(Strict(), {"x": torch.zeros(3, 6)}, dynamic=False)
