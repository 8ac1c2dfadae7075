from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune.errors import TraceError
from graphprune.trace.graph import Value
from graphprune.trace.model import trace


def test_weights_keep_the_models_names_and_shapes(llama):
    named = {**dict(llama.model.named_parameters()), **dict(llama.model.named_buffers())}
    weights = llama.groups.graph.weights
    assert set(weights) == set(named)
    assert all(weights[name].shape == tuple(tensor.shape) for name, tensor in named.items())


def test_a_tied_weight_stands_once_under_its_first_name(llama):
    assert llama.groups.graph.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    read_by = [
        o.target
        for o in llama.groups.graph.operators
        if any("embed" in v.name for v in o.inputs if v.is_weight)
    ]
    assert read_by == ["aten.embedding.default", "aten.linear.default"]


def test_adapters_are_there_by_name(adapted):
    names = [name for name in adapted.groups.graph.weights if "lora_A" in name]
    assert len(names) == 2 * 7


def test_arguments_carry_schema_names_and_defaults(llama):
    attention = next(o for o in llama.groups.graph.operators if "scaled_dot_product" in o.target)
    assert isinstance(attention["query"], Value)
    assert attention["dropout_p"] == 0.0
    assert attention["enable_gqa"] is False
    assert attention.module == "model.layers.0.self_attn"


def test_networkx_view_holds_every_operator_and_is_acyclic(llama):
    import networkx as nx

    graph = llama.groups.graph
    view = graph.nx
    operators = [node for node, data in view.nodes(data=True) if data["kind"] == "operator"]
    assert len(operators) == len(graph.operators)
    assert nx.is_directed_acyclic_graph(nx.DiGraph(view))
    assert nx.has_path(view, "model.layers.0.mlp.gate_proj.weight", graph.outputs[0].name)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(6, 10)

    def forward(self, x):
        first, second = self.fused(x).split([4, 6], dim=-1)
        return first, second


def test_several_results_of_one_operator_are_values_of_their_own():
    graph = trace(Branches(), {"x": torch.zeros(2, 6)})
    split = graph.operators[-1]
    assert [value.shape for value in split.outputs] == [(2, 4), (2, 6)]
    assert graph.outputs == split.outputs


def test_tracing_changes_nothing_and_needs_no_weights(build_llama):
    model = build_llama()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    trace(model, {"input_ids": torch.ones(2, 11, dtype=torch.long), "use_cache": False})
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    on_meta = trace(
        model.to("meta"),
        {"input_ids": torch.ones(2, 11, dtype=torch.long, device="meta"), "use_cache": False},
    )
    assert len(on_meta.operators) > 50


class Stubborn(nn.Module):
    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x


def test_a_model_that_cannot_be_exported_is_a_trace_error():
    with pytest.raises(TraceError, match="Stubborn"):
        trace(Stubborn(), {"x": torch.zeros(2)})


def test_a_model_without_weights_has_the_groups_of_one_with_them(llama, build_llama):
    from transformers import LlamaForCausalLM

    from graphprune.coupling.groups import node_groups

    with torch.device("meta"):
        empty = LlamaForCausalLM(llama.model.config).eval()
    graph = trace(empty, llama.inputs)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert graph.tied == llama.groups.graph.tied
    assert [row | {"reason": None} for row in node_groups(graph).rows()] == [
        row | {"reason": None} for row in llama.groups.rows()
    ]


def test_fake_weights_are_traced_too(llama):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaForCausalLM

    from graphprune.coupling.groups import node_groups

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = LlamaForCausalLM(llama.model.config).eval()
        inputs = {"input_ids": torch.zeros(2, 11, dtype=torch.long), "use_cache": False}
    assert list(node_groups(trace(fake, inputs))) == list(llama.groups)


def test_the_batch_and_the_sequence_stay_open(llama):
    (tokens,) = [node for node in llama.groups.graph.program.graph.nodes if node.name == "input_ids"]
    assert all(not isinstance(size, int) for size in tokens.meta["val"].shape)
    fixed = trace(llama.model, llama.inputs, dynamic=False)
    assert len(fixed.operators) <= len(llama.groups.graph.operators)


class Table(nn.Module):
    """A position table that is cut where the input ends."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.up, self.down = nn.Parameter(torch.randn(16, 6)), nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x):
        return self.down(torch.relu(self.up(x + self.places[: x.shape[1]])))


def test_what_an_input_cuts_off_is_not_called_unused():
    """Rows of a table beyond the example's sequence are read for longer ones."""
    from graphprune.coupling.groups import node_groups

    groups = node_groups(trace(Table(), {"x": torch.randn(2, 11, 6)}))
    rows = [g for g in groups.values() if any(m.parameter == "places" and m.axis == 0 for m in g.members)]
    assert rows
    assert not any(group.prunable for group in rows)


def test_what_cannot_be_traced_is_told():
    with pytest.raises(TraceError, match="a dict cannot be traced"):
        trace({}, {})
    with pytest.raises(TraceError, match="without example inputs"):
        trace(nn.Linear(2, 3))
