"""Weights that are rescaled by a norm of themselves, as DoRA and weight normalisation do."""

from __future__ import annotations

import re

from graphprune.trace.graph import OperatorGraph

_NORM = re.compile(r"\.(\w*norm\w*|sum|mean|var|std)\.")


def normed_weights(graph: OperatorGraph) -> dict[str, str]:
    """Return the weights of which a norm, or what makes one, is computed, each with the operator that does so.

    Only what is computed without the model's inputs counts: the norm of an activation is another matter.
    """
    origins = {name: frozenset({name}) for name in graph.weights}
    found: dict[str, str] = {}
    for operator in graph.operators:
        if any(value.name not in origins for value in operator.inputs):
            continue
        weights = frozenset[str]().union(*(origins[value.name] for value in operator.inputs))
        if _NORM.search(operator.target):
            found.update(dict.fromkeys(weights, operator.target))
        origins.update({value.name: weights for value in operator.outputs if value})
    return found
