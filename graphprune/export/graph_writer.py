"""Writing nodes and initializers into an ONNX graph, each initializer once."""

from __future__ import annotations

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

    def begin(self, prefix: str) -> None:
        """Start with no nodes; the names of those to come begin with `prefix`."""
        self._nodes = []
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
        label = f"{self._prefix}/{operator}.{len(self._nodes)}"
        added = ir.node(operator, inputs, attributes, domain=domain, name=label)
        added.outputs[0].name = f"{label}.output"
        self._nodes.append(added)
        return added.outputs[0]

    def initializer(self, name: str, make: Callable[[], np.ndarray]) -> ir.Value:
        """Return the initializer of this name; `make` computes it if the graph does not have it yet."""
        if name not in self._graph.initializers:
            array = np.ascontiguousarray(make())
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

    def make_overridable(self, initializer: ir.Value, shape: Sequence[int | str]) -> None:
        """List an initializer among the graph's inputs, so that a session may be fed another value."""
        initializer.shape = ir.Shape(shape)
        self._graph.inputs.append(initializer)

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
            output.name = f"{self._prefix}.output"
