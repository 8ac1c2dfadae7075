"""The exported program as something that runs on any weights: permuted, zeroed, or sliced."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_flatten

from graphprune.errors import InputsError
from graphprune.shrink.node_arguments import argument, set_argument
from graphprune.trace.fx import GUARDS

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER)
_HELD = (*_WEIGHTS, InputKind.CONSTANT_TENSOR)


class Program:
    """A traced model whose weights are given at each call.

    Args:
        exported: What the operator graph was made of; it is copied.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self.module: fx.GraphModule = copy.deepcopy(exported.graph_module)
        self._specs = tuple(exported.graph_signature.input_specs)
        self._constants = {
            name: item for name, item in exported.constants.items() if isinstance(item, Tensor)
        }
        positional, named = exported.example_inputs or ((), {})
        self._keywords = () if positional else tuple(named)
        erase_guards(self.module)

    @property
    def weight_names(self) -> dict[str, str]:
        """Qualified names of weights and constants by the name of their placeholder node."""
        return {spec.arg.name: spec.target for spec in self._specs if spec.kind in _HELD and spec.target}

    def in_double(self) -> Program:
        """Return the same program with every float type in it replaced by float64."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module)
        for part in graph_modules(twin.module):
            for node in part.graph.nodes:
                _write_epsilon(node)
                node.args = fx.node.map_aggregate(node.args, widen)
                node.kwargs = fx.node.map_aggregate(node.kwargs, widen)
            part.recompile()
        twin._constants = {name: double(constant) for name, constant in self._constants.items()}
        return twin

    def __call__(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Run on `weights` by qualified name and on the example inputs' keywords; return the tensor outputs.

        Raises:
            InputsError: If an input that was traced is missing.
        """
        missing = [name for name in self._keywords if name not in inputs]
        if missing:
            raise InputsError(
                f"the model was traced with {', '.join(self._keywords)}; not given: {', '.join(missing)}",
                f"give them by name; these were: {', '.join(inputs) or 'none'}",
            )
        given = iter(tree_flatten(((), {name: inputs[name] for name in self._keywords or inputs}))[0])
        arguments = []
        for spec in self._specs:
            if spec.kind in _WEIGHTS:
                arguments.append(weights[spec.target or ""])
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                arguments.append(self._constants[spec.target or ""])
            else:
                arguments.append(next(given))
        with torch.no_grad():
            outputs = self.module(*arguments)
        return tuple(item for item in tree_flatten(outputs)[0] if isinstance(item, Tensor))


def traced_inputs(exported: ExportedProgram) -> dict[str, Any]:
    """Return the example inputs that a program was exported with; positional ones by their place."""
    positional, named = exported.example_inputs or ((), {})
    return {**{str(place): item for place, item in enumerate(positional)}, **named}


def graph_modules(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Yield a traced graph, and those that its operators hold: what ran without gradients is one of its own."""
    yield from (part for part in module.modules() if isinstance(part, fx.GraphModule))


def erase_guards(module: fx.GraphModule) -> None:
    """Erase the exporter's assertions on types, devices and sizes, which hold for the traced weights alone."""
    for part in graph_modules(module):
        for node in list(part.graph.nodes):
            if str(node.target) in GUARDS:
                part.graph.erase_node(node)
        part.recompile()


def widen(argument: Any) -> Any:
    """Return float64 for any float type, and everything else as it is."""
    if not isinstance(argument, torch.dtype):
        return argument
    return torch.float64 if argument in (torch.float32, torch.float16, torch.bfloat16) else argument


def _write_epsilon(node: fx.Node) -> None:
    """Write down what a norm's eps defaults to, before the type that it follows is another."""
    if str(node.target) == "aten.rms_norm.default" and argument(node, "eps") is None:
        set_argument(node, "eps", torch.finfo(node.args[0].meta["val"].dtype).eps)  # type: ignore[union-attr]


def double(item: Any) -> Any:
    """Return a tensor of floats in float64, and everything else as it is."""
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item
