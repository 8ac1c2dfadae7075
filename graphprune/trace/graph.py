"""The operator graph: what every front end lowers to, and what the coupling analysis reads. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import networkx as nx

Role = Literal["input", "parameter", "buffer", "constant", "intermediate"]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that flows through the graph.

    Attributes:
        name: Unique in the graph; for parameters and buffers the model's own qualified name.
        shape: Sizes at the example inputs.
        dtype: The element type's name, such as ``float32``.
        role: Where it comes from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role

    @property
    def is_weight(self) -> bool:
        """Whether the model owns it (parameter or buffer), so that surgery can slice it."""
        return self.role in ("parameter", "buffer")


Argument: TypeAlias = "Value | int | float | bool | str | tuple[Argument, ...] | None"


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator call, its arguments named as in the operator's schema, defaults filled in.

    Attributes:
        name: Unique in the graph.
        target: The operator's own name, such as ``aten.linear.default``.
        arguments: By schema name.
        outputs: One value for each tensor that it returns; None for what is not a tensor.
        module: Qualified name of the module whose forward made the call, for messages only.
    """

    name: str
    target: str
    arguments: Mapping[str, Argument]
    outputs: tuple[Value | None, ...]
    module: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """All tensors that it reads, in schema order, each as often as it is read."""
        return tuple(value for argument in self.arguments.values() for value in _values_in(argument))


@dataclass(frozen=True)
class OperatorGraph:
    """Operators in execution order, and the values between them.

    Attributes:
        operators: In an order in which they can run.
        inputs: The model's inputs.
        weights: Parameters and buffers by qualified name; a tied parameter stands here once.
        outputs: The model's outputs.
        tied: Further names of a weight, each with the name it stands under in `weights`.
        program: The front end's own program, which surgery rewrites; opaque to the analysis.
    """

    operators: tuple[Operator, ...]
    inputs: tuple[Value, ...]
    weights: Mapping[str, Value]
    outputs: tuple[Value, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    program: Any = field(default=None, repr=False, compare=False)

    @cached_property
    def nx(self) -> nx.MultiDiGraph[str]:
        """Operators and values as a networkx graph: value → operator (edge ``argument``) → value."""
        graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        for value in (*self.inputs, *self.weights.values()):
            graph.add_node(value.name, kind="value", shape=value.shape, dtype=value.dtype, role=value.role)
        for operator in self.operators:
            node = f"{operator.name}()"
            graph.add_node(node, kind="operator", target=operator.target, module=operator.module)
            for argument, content in operator.arguments.items():
                for value in _values_in(content):
                    graph.add_edge(value.name, node, argument=argument)
            for position, output in enumerate(operator.outputs):
                if output is not None:
                    shape, dtype, role = output.shape, output.dtype, output.role
                    graph.add_node(output.name, kind="value", shape=shape, dtype=dtype, role=role)
                    graph.add_edge(node, output.name, position=position)
        return graph

    def names_of(self, weight: str) -> tuple[str, ...]:
        """Return every qualified name under which the model holds `weight`, the graph's own first."""
        return (weight, *sorted(name for name, canonical in self.tied.items() if canonical == weight))


def _values_in(argument: Argument) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _values_in(item)
