"""How many units one shot removes, of a module or of an ONNX graph: a share of the parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from graphprune.coupling.groups import NodeGroups
from graphprune.prune.budget import Budget, Layout, allot, normalised_by_kind, score_curves
from graphprune.prune.costs import Measured, cost_named
from graphprune.saliency.registry import kinds_compare


def one_shot_budget(
    groups: NodeGroups,
    scores: Mapping[str, Tensor],
    remove: float,
    saliency: str,
    *,
    layout: Layout,
    without: Collection[str] = (),
    width_multiple: Mapping[str, int] | None = None,
    keep_at_least: float = 0.0,
) -> Budget:
    """Return how many units each group loses.

    Args:
        groups: The node groups.
        scores: Saliency of each unit, by group.
        remove: The share of the parameters to remove, 0 to 1.
        saliency: What scored them, which tells whether scores of different kinds compare.
        layout: See `allot`.
        without: Names of parameters that are no part of the share, such as adapters'.
        width_multiple: See `allot`.
        keep_at_least: See `allot`.

    Raises:
        BudgetError: If so many cannot be removed.
    """
    counted = {name for name, value in groups.graph.weights.items() if value.role == "parameter"}
    cost = cost_named("parameters", Measured(groups, counted - {*without}), list(scores))
    curves = score_curves(scores)
    return allot(
        groups,
        curves if kinds_compare(saliency) else normalised_by_kind(curves, groups, cost),
        cost,
        remove=remove,
        layout=layout,
        width_multiple=width_multiple,
        keep_at_least=keep_at_least,
    )
