"""Packed matrices that multiply one value, such as those of query, key and value, as one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from graphprune.export.graph_writer import MICROSOFT, GraphWriter

_OPERANDS = 3
"""Rows, codes and scales; what has zero points or a bias of its own stays alone."""


def join_products(graph: ir.Graph) -> None:
    """Let products of one value with matrices of equal blocks be one product, whose columns are split again.

    The blocks of a packed matrix run along its rows, so that matrices one below the other are one, and each number of
    the product is what it was. Initializers stay as they are, under their own names: a session joins them when it
    opens.
    """
    writer = GraphWriter(graph)
    for products in list(_alike(graph)):
        _join(graph, writer, products)
    # What a later product's codes and scales are worked out by stands behind the first product, and now before it.
    graph.sort()


def _alike(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Yield the products of each value that differ in their rows alone, two or more."""
    found: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMulNBits" and node.domain == MICROSOFT and len(node.inputs) == _OPERANDS:
            attributes = {name: held.value for name, held in node.attributes.items() if name != "N"}
            found.setdefault((node.inputs[0], *sorted(attributes.items())), []).append(node)
    return (products for products in found.values() if len(products) > 1)


def _join(graph: ir.Graph, writer: GraphWriter, products: Sequence[ir.Node]) -> None:
    first = products[0]
    rows = [product.attributes["N"].as_int() for product in products]
    writer.begin("+".join(str(product.name).split("/")[0] for product in products))
    codes, scales = (
        writer.node("Concat", [product.inputs[place] for product in products], axis=0) for place in (1, 2)
    )
    attributes = {name: held.value for name, held in first.attributes.items()}
    joined = writer.node(
        "MatMulNBits", [first.inputs[0], codes, scales], domain=MICROSOFT, **{**attributes, "N": sum(rows)}
    )
    pieces = writer.split(joined, writer.integers(*rows), len(rows), axis=-1)
    writer.replace_each(products, pieces)
