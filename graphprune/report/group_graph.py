"""``groups.graphml``: groups and the parameters that they bind, for Gephi, yEd, Cytoscape and networkx."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import networkx as nx

from graphprune.files import replacing
from graphprune.report.group_document import Document
from graphprune.report.svg import legible


def membership_graph(document: Document) -> nx.MultiGraph[str]:
    """Return groups and parameters as nodes, and an edge for each axis in which a group has units.

    Node identifiers are ``group:NAME`` and ``parameter:NAME``; all attributes are plain texts, numbers or truth
    values, which is what GraphML can hold. Parameters that no group reaches are left out.

    Args:
        document: The groups, as ``groups.json`` holds them.
    """
    graph: nx.MultiGraph[str] = nx.MultiGraph(model=legible(document["model"]))
    parameters = {row["name"]: row for row in document["parameters"]}
    for row in document["groups"]:
        group = legible(f"group:{row['name']}")
        graph.add_node(
            group,
            type="group",
            label=legible(row["name"]),
            kind=legible(row["kind"]),
            units=row["size"],
            permutable=row["permutable"],
            prunable=row["prunable"],
            reason=legible(row["reason"] or ""),
            parameters_per_unit=row["parameters_per_unit"],
            operators=legible(_operators(row["operators"])),
        )
        for member in row["members"]:
            name = member["parameter"]
            shape = " × ".join(str(size) for size in parameters[name]["shape"])
            role = parameters[name]["role"]
            node = legible(f"parameter:{name}")
            graph.add_node(node, type="parameter", label=legible(name), shape=shape, role=role)
            attributes = {key: member[key] for key in ("axis", "size", "side")}
            graph.add_edge(group, node, **attributes, indices_per_unit=member["per_unit"])
    return graph


def write_graphml(document: Document, path: Path) -> None:
    """Write the graph of `membership_graph`, atomically."""
    with replacing(path) as temporary:
        nx.write_graphml(membership_graph(document), temporary, named_key_ids=True)


def _operators(operators: list[dict[str, str]]) -> str:
    counts = Counter(operator["target"] for operator in operators)
    return ", ".join(f"{target} × {count}" for target, count in counts.items())
