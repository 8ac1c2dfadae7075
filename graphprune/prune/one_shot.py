"""One shot on a module: score, decide, repair, cut. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import TrainingError
from graphprune.prune.budget import Budget, Layout, targets
from graphprune.prune.one_shot_budget import one_shot_budget
from graphprune.prune.repair.activations import Calibration
from graphprune.prune.repair.named import Repair, RepairName, repair_named
from graphprune.saliency.effective import effective_weights
from graphprune.saliency.gates import Gates
from graphprune.saliency.registry import Evidence, saliency_named
from graphprune.shrink.gated import is_gated
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.trace.inputs import keyword_inputs

Loss = Callable[[Any], Tensor]
"""From a model's output to the scalar that it is judged by."""


@dataclass(frozen=True, slots=True)
class PrunedModule:
    """What came of it.

    Attributes:
        model: The smaller model.
        plan: Which units were removed.
        budget: How many, and what they cost.
    """

    model: nn.Module
    plan: Plan
    budget: Budget


def prune_one_shot(
    model: nn.Module,
    groups: NodeGroups,
    batches: Sequence[Any] = (),
    *,
    remove: float,
    saliency: str = "wanda",
    kinds: Collection[str] = ("ffn",),
    repair: RepairName = "least_squares",
    loss: Loss | None = None,
    layout: Layout = "uniform",
    width_multiple: Mapping[str, int] | None = None,
    keep_at_least: float = 0.0,
    seed: int = 0,
) -> PrunedModule:
    """Remove a share of a model's parameters, those units that a saliency takes for the least.

    Args:
        model: The model, with adapters or without; neither its weights nor their gradients are changed.
        groups: Its node groups.
        batches: Calibration inputs, each as `graphprune.trace` takes them. All positions count, padding too.
        remove: The share of the parameters to remove, 0 to 1; adapters are no part of them.
        saliency: A registered saliency. Those that look at adapters' gradients need adapters that are trainable.
        kinds: Kinds of groups that may lose units.
        repair: What makes up for them: ``least_squares``, ``bias`` or ``none``.
        loss: From the model's output to the scalar whose gradients ``fisher``, ``taylor`` and others look at; None for
            the output's ``loss``, which transformers' models give where a batch has ``labels``.
        layout: ``uniform``: one width for all groups of a kind and size; ``per_layer``: each group its own, though
            scores that are not of the loss hardly compare from layer to layer.
        width_multiple: By kind, what the number of units that stay is a multiple of.
        keep_at_least: The share of its units that each group keeps.
        seed: Of what is drawn at random.

    Raises:
        BudgetError: If so many cannot be removed.
        TrainingError: If the saliency or the repair does not fit the model, or there is too little to calibrate on.
        ShrinkError: If the model cannot be cut.
    """
    if is_gated(model):
        raise TrainingError(
            "the model has the gates of an optimizer on it", "call close() on that optimizer first"
        )
    names = [group.name for group in targets(groups, (kinds,) if isinstance(kinds, str) else kinds)]
    inputs = [keyword_inputs(model, batch) for batch in batches]
    factors = {name for weight in effective_weights(model, groups).values() for name in weight.factors()}
    with _judged(model, factors):
        scores = _scores(model, groups, names, inputs, saliency, loss, seed)
        budget = one_shot_budget(
            groups,
            scores,
            remove,
            saliency,
            layout=layout,
            without=factors,
            width_multiple=width_multiple,
            keep_at_least=keep_at_least,
        )
        gates = Gates(model, groups, budget.removed_units)
        try:
            calibration = Calibration.of_batches(inputs, lambda batch: model(**batch))
            made_up = repair_named(repair, model, groups, gates, calibration)
            shut_least(gates, scores, budget, made_up)
            plan = Plan(gates.redundant())
        finally:
            gates.close()

    def cut() -> nn.Module:
        return shrink(model, groups, plan)

    return PrunedModule(made_up.cut(plan, cut) if made_up else cut(), plan, budget)


def shut_least(gates: Gates, scores: Mapping[str, Tensor], budget: Budget, repair: Repair | None) -> None:
    """Shut the gates of the units that score least, as many as a budget says, and let a repair stand in for them."""
    with torch.no_grad():
        for name, count in budget.removed_units.items():
            gates.values[name][scores[name].argsort(stable=True)[:count]] = 0
    if repair:
        repair.update(lambda name: gates.values[name] == 0)


def _scores(
    model: nn.Module,
    groups: NodeGroups,
    names: list[str],
    inputs: Sequence[Mapping[str, Any]],
    saliency: str,
    loss: Loss | None,
    seed: int,
) -> dict[str, Tensor]:
    judge = loss or _own_loss

    def judged(batch: Any) -> Tensor:
        return judge(model(**batch))

    gates = Gates(model, groups, names)
    try:
        return saliency_named(saliency)(Evidence(model, groups, gates, inputs, judged, seed))
    finally:
        gates.close()


@contextmanager
def _judged(model: nn.Module, factors: Collection[str]) -> Iterator[None]:
    """Within the block the model is in evaluation mode and but its adapters can have gradients, which it forgets."""
    training = {module: module.training for module in model.modules()}
    before = {name: (p, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    model.eval()
    for name, (parameter, trainable, _) in before.items():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(trainable and name in factors)
    try:
        yield
    finally:
        for parameter, trainable, gradient in before.values():
            parameter.requires_grad_(trainable)
            parameter.grad = gradient
        for module, was in training.items():
            module.training = was


def _own_loss(output: Any) -> Tensor:
    """Return the loss that a model works out itself; a scalar without gradients where it works out none."""
    loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else torch.zeros(())
