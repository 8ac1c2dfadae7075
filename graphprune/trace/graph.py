"""The operator graph: what every front end lowers to, and what the coupling analysis reads. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import NDArray

# They take nothing but sizes and types from their operands, not numbers.
_FACTORY = re.compile(r"\.(zeros|ones|full|empty|arange|eye|new_\w+|\w+_like)\.")
_IN_PLACE = re.compile(r"\.\w*[a-z0-9]_\.")
# They take nothing but the type of this operand.
_TYPE_GIVERS = {"aten.type_as.default": "other", "aten.to.other": "other", "onnx.CastLike": "target_type"}

Role = Literal["input", "parameter", "buffer", "constant", "intermediate"]


class DynamicSize(int):
    """A number that follows from the sizes of the inputs: known for the example only."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that flows through the graph.

    Attributes:
        name: Unique in the graph; for parameters and buffers the model's own qualified name.
        shape: Sizes at the example inputs.
        dtype: The element type's name, such as ``float32``.
        role: Where it comes from.
        content: Its numbers, where a few integers are known from the graph alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    content: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)

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
        module: Qualified name of the module whose forward made the call; "" for the model's own.
        inputs: All tensors that it reads, in schema order, each as often as it is read.
    """

    name: str
    target: str
    arguments: Mapping[str, Argument]
    outputs: tuple[Value | None, ...]
    module: str = ""
    inputs: tuple[Value, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        read = tuple(value for argument in self.arguments.values() for value in _values_in(argument))
        object.__setattr__(self, "inputs", read)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def sources(self) -> tuple[Value, ...]:
        """The inputs of which more than the type matters: all but the one that ``type_as`` is told the type by."""
        giver = _TYPE_GIVERS.get(self.target)
        if giver is None:
            return self.inputs
        kept = (argument for name, argument in self.arguments.items() if name != giver)
        return tuple(value for argument in kept for value in _values_in(argument))

    @property
    def is_factory(self) -> bool:
        """Whether its result holds no number of its operands."""
        return _is_factory(self.target)

    @property
    def has_own_shape(self) -> bool:
        """Whether it is a factory that is told its sizes; ``zeros_like`` takes them from its operand."""
        return self.is_factory and "_like." not in self.target

    @property
    def in_place(self) -> bool:
        """Whether it writes into its first operand."""
        return _is_in_place(self.target)


@dataclass(frozen=True)
class OperatorGraph:
    """Operators in execution order, and the values between them.

    Attributes:
        operators: In an order in which they can run.
        inputs: The model's inputs.
        weights: Parameters and buffers by qualified name; a tied parameter stands here once.
        outputs: The model's outputs.
        states: Names of an input and an output that are one cache before and after a call: its axes may change.
        tied: Further names of a weight, each with the name it stands under in `weights`.
        program: The front end's own program, which surgery rewrites; opaque to the analysis.
    """

    operators: tuple[Operator, ...]
    inputs: tuple[Value, ...]
    weights: Mapping[str, Value]
    outputs: tuple[Value, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    program: Any = field(default=None, repr=False, compare=False)
    states: tuple[tuple[str, str], ...] = ()

    @cached_property
    def nx(self) -> nx.MultiDiGraph[str]:
        """Operators and values as a networkx graph: value → operator (edge ``argument``) → value."""
        graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        read = (value for operator in self.operators for value in operator.inputs if value.role == "constant")
        for value in (*self.inputs, *self.weights.values(), *read):
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

    @cached_property
    def dependence(self) -> Dependence:
        """What each value is computed from."""
        return Dependence.of(self)

    @cached_property
    def state_names(self) -> frozenset[str]:
        """Names of all inputs and outputs that are caches."""
        return frozenset(name for pair in self.states for name in pair)

    def names_of(self, weight: str) -> tuple[str, ...]:
        """Return every qualified name under which the model holds `weight`, the graph's own first."""
        return (weight, *sorted(name for name, canonical in self.tied.items() if canonical == weight))


@dataclass(frozen=True, slots=True)
class Dependence:
    """Names of the values that are computed from parameters, and of those computed from the model's inputs."""

    on_parameters: frozenset[str]
    on_inputs: frozenset[str]

    @classmethod
    def of(cls, graph: OperatorGraph) -> Dependence:
        """Follow parameters and inputs through a graph."""
        parameters = {name for name, value in graph.weights.items() if value.role == "parameter"}
        return cls(
            frozenset(_reached(graph.operators, parameters)),
            frozenset(_reached(graph.operators, {value.name for value in graph.inputs})),
        )


def _reached(operators: Sequence[Operator], sources: set[str]) -> set[str]:
    """Return everything that is computed from `sources`, memory that operators write into included."""
    producers = {value.name: operator for operator in operators for value in operator.outputs if value}
    flowing = [operator for operator in operators if not operator.has_own_shape]
    reached, written = set(sources), set[str]()
    while True:
        for operator in flowing:
            if any(value.name in reached for value in operator.sources):
                reached.update(value.name for value in operator.outputs if value is not None)
                if operator.in_place:
                    written.update(_aliased(operator, producers))
        if written <= reached:
            return reached
        reached |= written


def _aliased(operator: Operator, producers: Mapping[str, Operator]) -> Iterator[str]:
    """Yield the value that an in-place operator writes into, and those that it may be a view of."""
    pending = list(operator.inputs[:1])
    while pending:
        value = pending.pop()
        yield value.name
        if value.name in producers:
            pending.extend(producers[value.name].inputs[:1])


@cache
def _is_factory(target: str) -> bool:
    return _FACTORY.search(target) is not None


@cache
def _is_in_place(target: str) -> bool:
    return _IN_PLACE.search(target) is not None


def _values_in(argument: Argument) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _values_in(item)
