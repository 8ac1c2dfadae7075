"""How many units each group loses, such that the smaller model's folder can be opened again.

The smaller model is built without numbers before anything is trained: what its class or its saved folder cannot
express is found out then. Widths that the stock configuration refuses are left out, and the budget is shared anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graphprune.errors import BudgetError, RefusedWidthsError, ShrinkError, UndescribedWidthsError
from graphprune.files import write_text
from graphprune.pipeline.session import Session
from graphprune.prune.budget import Budget, Width
from graphprune.prune.distribution import Distribution
from graphprune.prune.target import recipe_budget, recipe_distribution
from graphprune.prune.timing import TimeTable
from graphprune.report.distribution_picture import distribution_picture
from graphprune.shrink.biases import allow_biases
from graphprune.shrink.config import fit_config
from graphprune.shrink.load import Difference
from graphprune.shrink.outline import outline
from graphprune.shrink.plan import Plan


def measured_budget(session: Session, scores: Mapping[str, Tensor]) -> Budget:
    """Decide how many units each group loses, on the knowledge distribution if that is asked for.

    Args:
        session: The run.
        scores: Saliency of each unit, by group.

    Raises:
        BudgetError: If the target cannot be met, or layers would differ in width where none may.
        ShrinkError: If the smaller model could not be opened again.
    """
    settings, groups = session.recipe.prune, session.groups
    with session.reporter.task("knowledge distribution") as tick:
        distribution = recipe_distribution(
            session.adapted,
            groups,
            settings,
            session.inputs.train,
            scores,
            seed=session.recipe.seed,
            path=session.path("graph/distribution.json"),
            progress=lambda done, total: tick(done, "groups", total),
        )
    if distribution is not None:
        write_text(
            session.path("graph/distribution.svg"), distribution_picture(distribution.rows(groups)) + "\n"
        )
    return budget_that_opens(session, scores, distribution)


def budget_that_opens(
    session: Session, scores: Mapping[str, Tensor], distribution: Distribution | None = None
) -> Budget:
    """Share the recipe's budget out among widths that a folder can express.

    Args:
        session: The run.
        scores: Saliency of each unit, by group.
        distribution: What was measured of each group.

    Raises:
        BudgetError: If the target cannot be met, or layers would differ in width where none may.
        ShrinkError: If the smaller model could not be opened again.
    """
    times = TimeTable(session.path("graph/latency.json"), device=session.dense.device)
    refused: set[Width] = set()
    while True:
        try:
            budget = recipe_budget(
                session.groups,
                session.recipe.prune,
                scores,
                counted=session.counted,
                distribution=distribution,
                times=times,
                refused=refused,
            )
        except BudgetError as error:
            raise _without(session, refused, error) from error
        try:
            _check_opens(session, budget.removed_units, uniform=budget.is_uniform(session.groups))
        except ShrinkError as error:
            found = _refused_alone(session, budget, RefusedWidthsError)
            if not found and _may_leave_out(session, error):
                found = _left_out(session, _refused_alone(session, budget, UndescribedWidthsError))
            if not found:
                raise
            refused |= found
        else:
            return budget


def describe_widths(session: Session, small: Any, budget: Budget, plan: Plan) -> Any:
    """Return the configuration that a smaller model is saved with; it gets the biases that come with its own.

    Args:
        session: The run.
        small: The smaller model, adapters merged.
        budget: How many units went.
        plan: Which ones.

    Raises:
        ShrinkError: If layers are to have one width, and no configuration describes them.
    """
    if budget.is_uniform(session.groups):
        config = allow_biases(session.inputs.config, small)
        try:
            return fit_config(config, small, session.groups, plan)
        except ShrinkError:
            if session.recipe.prune.layout == "uniform":
                raise
    return allow_biases(small.config, small)


def _check_opens(session: Session, removed_units: Mapping[str, int], *, uniform: bool) -> None:
    """Raise a ShrinkError if the folder could not express what is left; nothing but shapes is computed."""
    groups = session.groups
    small: nn.Module = outline(session.adapted, groups, removed_units).unload()
    if uniform:
        plan = Plan({name: range(count) for name, count in removed_units.items()})
        try:
            fit_config(session.inputs.config, small, groups, plan)
            return
        except ShrinkError:
            if session.recipe.prune.layout == "uniform":
                raise
    Difference.of(small)


def _may_leave_out(session: Session, error: ShrinkError) -> bool:
    """Whether kinds that the stock configuration has no setting for may stay whole: nobody asked for them by name."""
    settings = session.recipe.prune
    asked = "kinds" in settings.model_fields_set or settings.layout != "uniform"
    return not asked and isinstance(error, UndescribedWidthsError)


def _left_out(session: Session, widths: set[Width]) -> set[Width]:
    """Return all widths but the whole of the groups that some widths are of, and tell so."""
    groups = {name: session.groups[name] for name, _ in widths}
    for kind in sorted({group.kind.replace("_", " ") for group in groups.values()}):
        session.reporter.say(
            f"    {kind} stay: no setting of {type(session.inputs.config).__name__} describes fewer "
            "(prune.layout per_layer takes them, for graphprune.load)"
        )
    return {(name, kept) for name, group in groups.items() for kept in range(group.size)}


def _refused_alone(session: Session, budget: Budget, because: type[ShrinkError]) -> set[Width]:
    """Return the widths of a budget that are refused, by an error of this class, though nothing else changes."""
    families: dict[tuple[str, int], dict[str, int]] = {}
    for name, count in budget.removed_units.items():
        group = session.groups[name]
        families.setdefault((group.kind, group.size), {})[name] = count
    found: set[Width] = set()
    for removed_units in families.values():
        try:
            _check_opens(session, removed_units, uniform=True)
        except ShrinkError as error:
            if not isinstance(error, because):
                continue
            found |= {(name, session.groups[name].size - count) for name, count in removed_units.items()}
    return found


def _without(session: Session, refused: set[Width], error: BudgetError) -> BudgetError:
    """Return an error that also says which widths were left out."""
    if not refused:
        return error
    widths: dict[str, set[int]] = {}
    for name, kept in refused:
        widths.setdefault(session.groups[name].kind, set()).add(kept)
    whole = {
        group.kind
        for name, group in session.groups.items()
        if all((name, kept) in refused for kept in range(group.size))
    }
    words = "; ".join(
        f"{kind}: {'all' if kind in whole else ', '.join(map(str, sorted(kept)))}"
        for kind, kept in sorted(widths.items())
    )
    return BudgetError(
        f"{error.problem}, without the widths that stock {type(session.inputs.config).__name__} refuses ({words})",
        f"{error.remedy}; or set prune.layout to per_layer: graphprune.load opens such a model",
    )
