"""Surgery on the traced graph: always exact, for any model; the result is a GraphModule."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.shrink.program import erase_guards
from graphprune.shrink.resize import resize_graph
from graphprune.shrink.weights import named_weights, select_weight


def shrink_graph(
    model: nn.Module | ExportedProgram, groups: NodeGroups, kept: Mapping[str, Indices]
) -> fx.GraphModule:
    """Return the traced program with some units only, its weights under the model's own names.

    It takes the keyword arguments that it was traced with and returns what the model does. It trains (without dropout,
    as it was traced in evaluation mode), saves and exports like any module, for every batch and sequence where the
    trace left them open.

    Args:
        model: Where the weights come from.
        groups: Its node groups.
        kept: Units that stay, by group name.
    """
    program: ExportedProgram = groups.graph.program
    small = program.module(check_guards=False)
    for method in ("train", "eval"):  # the exporter forbids both; nothing in the graph depends on them
        small.__dict__.pop(method, None)
    erase_guards(small)
    resize_graph(small, groups, kept, _weight_nodes(small))
    _set_weights(small, dict(named_weights(model)), groups, kept)
    return small


def _weight_nodes(module: fx.GraphModule) -> dict[str, str]:
    return {node.name: str(node.target) for node in module.graph.nodes if node.op == "get_attr"}


def _set_weights(
    module: fx.GraphModule, weights: Mapping[str, Tensor], groups: NodeGroups, kept: Mapping[str, Indices]
) -> None:
    """Give the graph copies of the weights, sliced; tied ones stay one tensor."""
    made: dict[int, Tensor] = {}
    for path, owner in module.named_modules():
        for store in (owner._parameters, owner._buffers):
            for name, held in store.items():
                full = f"{path}.{name}" if path else name
                source = weights.get(full)
                if held is None or source is None:
                    continue
                if id(source) not in made:
                    small = select_weight(full, source.detach(), groups, kept).clone().contiguous()
                    made[id(source)] = (
                        nn.Parameter(small, source.requires_grad) if isinstance(held, nn.Parameter) else small
                    )
                store[name] = made[id(source)]
