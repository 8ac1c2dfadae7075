"""From the recipe's target to a budget: what is counted, how groups are compared, and which stay whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import BudgetError, RecipeError
from graphprune.prune.budget import Budget, Curve, Width, allot, normalised_by_kind, score_curves, targets
from graphprune.prune.costs import Cost, Measured, Times, bits_by_use, cost_named
from graphprune.prune.distribution import Distribution, measure_distribution
from graphprune.prune.training import Objective, logits_of
from graphprune.recipe import Prune
from graphprune.saliency.gates import Gates
from graphprune.saliency.registry import kinds_compare
from graphprune.source.text import Windows


def recipe_cost(
    groups: NodeGroups,
    settings: Prune,
    counted: Collection[str],
    names: Collection[str],
    budget: str = "",
    times: Times | None = None,
) -> Cost:
    """Return the cost that a recipe's budget is of.

    Args:
        groups: The node groups.
        settings: The recipe's section.
        counted: Names of the parameters that count.
        names: Groups whose units may go.
        budget: Another cost than the recipe's.
        times: Seconds of a matrix product, for a budget of latency.
    """
    bits = bits_by_use(groups, counted, matrices=settings.weight_bits, tables=settings.embedding_bits)
    measured = Measured(
        groups,
        counted,
        sequence=settings.sequence,
        bits=bits,
        tokens=settings.latency_tokens,
        times=times,
    )
    return cost_named(budget or settings.budget, measured, names)


def recipe_budget(
    groups: NodeGroups,
    settings: Prune,
    scores: Mapping[str, Tensor],
    *,
    counted: Collection[str],
    distribution: Distribution | None = None,
    times: Times | None = None,
    refused: Collection[Width] = (),
) -> Budget:
    """Return how many units each group loses.

    With a knowledge distribution the measured rise of the loss decides how many units a group loses, and scores only
    which; its worst share of groups stays whole if the recipe says so.

    Args:
        groups: The node groups.
        settings: The recipe's section.
        scores: Saliency of each unit, by group.
        counted: Names of the parameters that count.
        distribution: What was measured of each group.
        times: Seconds of a matrix product, for a budget of latency.
        refused: Widths that no group may have.

    Raises:
        BudgetError: If no allocation comes within a step of the target.
    """
    names = [group.name for group in targets(groups, settings.kinds)]
    if distribution is not None:
        whole = set(distribution.most_sensitive(settings.distribution.unprunable))
        names = [name for name in names if name in distribution.groups and name not in whole]
    if not names:
        raise BudgetError("no group is left that may lose units", "lower prune.distribution.unprunable")
    cost = recipe_cost(groups, settings, counted, names, times=times)
    curves: Mapping[str, Curve]
    if distribution is not None:
        measured = distribution.curves({name: groups[name].size for name in distribution.groups})
        curves = {name: measured[name] for name in names}
    else:
        curves = score_curves({name: scores[name] for name in names})
        if settings.normalise == "kind" or (
            settings.normalise == "auto" and not kinds_compare(settings.saliency)
        ):
            curves = normalised_by_kind(curves, groups, cost)
    return allot(
        groups,
        curves,
        cost,
        remove=settings.remove,
        layout=settings.layout,
        width_multiple=settings.width_multiple,
        keep_at_least=settings.keep_at_least,
        refused=refused,
    )


def recipe_distribution(
    model: Any,
    groups: NodeGroups,
    settings: Prune,
    windows: Windows,
    scores: Mapping[str, Tensor],
    *,
    seed: int,
    path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Distribution | None:
    """Measure the knowledge distribution as a recipe asks for it, or return None where it does not.

    In float32: in bfloat16 the loss is rounded by more than a small group moves it.

    Args:
        model: The model; it is left as it was, bit for bit.
        groups: Its node groups.
        settings: The recipe's section.
        windows: Training text, of which other windows are taken than units are scored on.
        scores: Saliency of each unit, by group.
        seed: By which the windows that units are scored on were drawn.
        path: Where measurements are kept.
        progress: Told how many of how many groups are done.

    Raises:
        RecipeError: If the text is too short for windows that were not scored on.
    """
    asked = settings.distribution
    if not asked.ratios:
        return None
    check_windows(settings, windows)
    drawn = windows.drawn(settings.calibration_windows + asked.windows, seed)[settings.calibration_windows :]
    gates = Gates(model, groups, [group.name for group in targets(groups, settings.kinds)])
    loss = Objective(logits_of(model), None, 0.0, autocast=False)
    batches = drawn.split(settings.training.batch_size)
    try:
        return measure_distribution(
            gates, scores, batches, loss, ratios=asked.ratios, path=path, progress=progress
        )
    finally:
        gates.close()


def check_windows(settings: Prune, windows: Windows) -> None:
    """Check that a text has as many windows as a recipe asks of it.

    Raises:
        RecipeError: If the distribution finds too few that were not scored on, or least squares fewer than two.
    """
    asked = settings.distribution
    if asked.ratios and len(windows) < settings.calibration_windows + asked.windows:
        raise RecipeError(
            f"prune.distribution asks for {asked.windows} windows beside the {settings.calibration_windows} that "
            f"units are scored on, and '{windows.name}' has {len(windows)}",
            "lower one of them, or give more text",
        )
    found = min(len(windows), settings.calibration_windows)
    if settings.method != "blocks" and settings.repair == "least_squares" and found < 2:
        raise RecipeError(
            f"prune.repair least_squares needs 2 windows, one of them to choose the ridge on, and has {found}: "
            f"'{windows.name}' has {len(windows)}, prune.calibration_windows is {settings.calibration_windows}",
            "give more, or set prune.repair to none",
        )
