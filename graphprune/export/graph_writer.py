"""Writing nodes and initializers into an ONNX graph, each initializer once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class GraphWriter:
    """Collects the nodes that take the place of one node, and registers initializers.

    Args:
        graph: Where initializers go at once and nodes when `replace` is called.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self._prefix = ""
        self._counts: Counter[str] = Counter()

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes since `begin`."""
        return self._nodes

    def begin(self, prefix: str) -> None:
        """Start with no nodes; the names of those to come begin with `prefix`."""
        self._nodes = []
        self._prefix = prefix

    def label(self, prefix: str) -> None:
        """Let the names of the nodes to come begin with another prefix."""
        self._prefix = prefix

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Add a node with one output and return the output."""
        label = self._label(operator)
        added = ir.node(operator, inputs, attributes, domain=domain, name=label)
        added.outputs[0].name = f"{label}.output"
        self._nodes.append(added)
        return added.outputs[0]

    def split(self, x: ir.Value, sizes: ir.Value, count: int, *, axis: int = 0) -> list[ir.Value]:
        """Cut an axis into `count` pieces of these sizes, which may be 0."""
        label = self._label("Split")
        added = ir.node("Split", [x, sizes], {"axis": axis}, num_outputs=count, name=label)
        for index, piece in enumerate(added.outputs):
            piece.name = f"{label}.output.{index}"
            if x.shape is not None:
                cut = axis % len(x.shape)
                piece.shape = ir.Shape([None if place == cut else size for place, size in enumerate(x.shape)])
        self._nodes.append(added)
        return list(added.outputs)

    def initializer(self, name: str, make: Callable[[], np.ndarray]) -> ir.Value:
        """Return the initializer of this name; `make` computes it if the graph does not have it yet."""
        if name not in self._graph.initializers:
            array = np.asarray(make(), order="C")
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def integers(self, *numbers: int) -> ir.Value:
        """Return an int64 vector, such as a shape; equal vectors are one initializer."""
        name = "shape." + ".".join(str(number) for number in numbers)
        return self.initializer(name, lambda: np.array(numbers, dtype=np.int64))

    def index(self, number: int) -> ir.Value:
        """Return an int64 scalar."""
        return self.initializer(f"index.{number}", lambda: np.array(number, dtype=np.int64))

    def make_overridable(self, initializer: ir.Value, shape: Sequence[int | str]) -> None:
        """List an initializer among the graph's inputs, so that a session may be fed another value."""
        if initializer not in self._graph.inputs:
            initializer.shape = ir.Shape(shape)
            self._graph.inputs.append(initializer)

    def drop_unread(self) -> None:
        """Remove the nodes of the graph that nothing reads."""
        for node in reversed(list(self._graph)):
            if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                self._graph.remove(node, safe=True)

    def insert_before(self, node: ir.Node) -> None:
        """Put the collected nodes in front of `node`."""
        self._graph.insert_before(node, self._nodes)

    def replace(self, old: ir.Node, output: ir.Value) -> None:
        """Put the collected nodes in the place of `old`, whose only output becomes `output`."""
        ir.convenience.replace_nodes_and_values(
            self._graph,
            insertion_point=old,
            old_nodes=[old],
            new_nodes=self._nodes,
            old_values=[old.outputs[0]],
            new_values=[output],
        )
        if not output.is_graph_output():
            output.name = self._output_name()

    def replace_each(self, old: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
        """Put the collected nodes in the place of the first of several, whose only outputs become `outputs`."""
        ir.convenience.replace_nodes_and_values(
            self._graph,
            insertion_point=old[0],
            old_nodes=old,
            new_nodes=self._nodes,
            old_values=[node.outputs[0] for node in old],
            new_values=outputs,
        )

    def _label(self, operator: str) -> str:
        """Return a node's name; a module that computes twice goes on counting."""
        number = self._counts[self._prefix]
        self._counts[self._prefix] += 1
        return f"{self._prefix}/{operator}.{number}"

    def _output_name(self) -> str:
        name = f"{self._prefix}.output"
        number = self._counts[name]
        self._counts[name] += 1
        return f"{name}.{number}" if number else name
