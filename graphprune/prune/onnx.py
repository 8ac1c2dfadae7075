"""One shot on an ONNX graph: score, decide, repair, cut. No module is built, and nothing is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import TrainingError
from graphprune.prune.budget import Budget, Layout, targets
from graphprune.prune.one_shot_budget import one_shot_budget
from graphprune.prune.repair.activations import HELD_OUT
from graphprune.prune.repair.least_squares import predict
from graphprune.saliency.onnx import Reader, onnx_scores, readers_of, summed
from graphprune.shrink.model import shrink
from graphprune.shrink.onnx import fitting_model
from graphprune.shrink.onnx_weights import held_values, set_numbers
from graphprune.shrink.plan import Plan


@dataclass(frozen=True, slots=True)
class PrunedOnnx:
    """What came of it.

    Attributes:
        model: The smaller model.
        plan: Which units were removed.
        budget: How many, and what they cost.
    """

    model: ir.Model
    plan: Plan
    budget: Budget


def prune_onnx(
    model: Any,
    groups: NodeGroups,
    batches: Sequence[Mapping[str, Any]] = (),
    *,
    remove: float,
    saliency: str = "wanda",
    kinds: Collection[str] = ("ffn",),
    repair: bool = True,
    layout: Layout = "uniform",
    width_multiple: Mapping[str, int] | None = None,
    keep_at_least: float = 0.0,
) -> PrunedOnnx:
    """Remove a share of a model's parameters.

    Args:
        model: The path of a file, an `onnx_ir.Model`, or None for the one that was traced; it is not changed.
        groups: Its node groups.
        batches: Calibration inputs, each as arrays or tensors by name.
        remove: The share of the parameters to remove, 0 to 1.
        saliency: ``magnitude``, ``wanda`` or ``flap``.
        kinds: Kinds of groups that may lose units. Scores that are not of the loss hardly compare from kind to kind.
        repair: Whether what goes is predicted from what stays by least squares, and folded into what reads it.
        layout: ``uniform``: one width for all groups of a kind and size; ``per_layer``: each group its own, though
            scores that are not of the loss hardly compare from layer to layer.
        width_multiple: By kind, what the number of units that stay is a multiple of.
        keep_at_least: The share of its units that each group keeps.

    Raises:
        BudgetError: If so many cannot be removed.
        TrainingError: If weights are codes, or there is too little to calibrate on.
        ShrinkError: If an operator cannot be told of the new sizes.
    """
    whole = fitting_model(model, groups)
    names = [group.name for group in targets(groups, kinds)]
    scores = onnx_scores(saliency, whole, groups, names, batches)
    budget = one_shot_budget(
        groups,
        scores,
        remove,
        saliency,
        layout=layout,
        width_multiple=width_multiple,
        keep_at_least=keep_at_least,
    )
    plan = Plan(
        {
            name: scores[name].argsort(stable=True)[:count].tolist()
            for name, count in budget.removed_units.items()
        }
    )
    if repair:
        whole = repaired(whole, groups, plan, batches)
    return PrunedOnnx(shrink(whole, groups, plan), plan, budget)


def repaired(
    model: ir.Model, groups: NodeGroups, plan: Plan, batches: Sequence[Mapping[str, Any]]
) -> ir.Model:
    """Return a copy of a model whose weights do without units what they did with them, as far as can be.

    What a linear map or a convolution reads of units that go is predicted by least squares from what it reads else,
    and the prediction folded into its weight; the weights of the units themselves stay for surgery to take.

    Args:
        model: The graph that `groups` were read off.
        groups: Its node groups.
        plan: Which units go.
        batches: Calibration inputs by name; one of so many is held out, on which the ridge is chosen.

    Raises:
        TrainingError: If there are fewer than two batches, or moments are not finite.
    """
    if len(batches) < 2:
        raise TrainingError(
            f"a ridge is chosen on inputs that nothing is fitted to, and there are {len(batches)} batches in all",
            "give two or more, or repair=False",
        )
    readers = readers_of(model, groups, [groups[name] for name in plan])
    small = model.clone()
    if not readers:
        return small
    fitted, held = (
        summed(model, readers, part, lambda tokens: tokens.T @ tokens)
        for part in (
            [batch for number, batch in enumerate(batches) if number % HELD_OUT != 1],
            batches[1::HELD_OUT],
        )
    )
    predictions: dict[tuple[str, bytes], Any] = {}
    for reader in readers:
        gone = _gone(groups, plan, reader)
        if bool(gone.all()):
            continue
        key = reader.source, gone.numpy().tobytes()
        if key not in predictions:
            predictions[key] = predict(fitted[reader.source], held[reader.source], gone)
        _replace(small, reader, predictions[key].fold(reader.weight, reader.axis))
    return small


def _gone(groups: NodeGroups, plan: Plan, reader: Reader) -> Tensor:
    """Return a mask (indices,) of the indices of what is read that removed units own."""
    gone = torch.zeros(reader.weight.shape[reader.axis], dtype=torch.bool)
    for name, units in plan.items():
        for member in groups[name].consumers:
            if (member.parameter, member.axis) == (reader.parameter, reader.axis):
                gone |= torch.isin(torch.from_numpy(groups[name].owner(member)), torch.tensor(units))
    return gone


def _replace(model: ir.Model, reader: Reader, weight: Tensor) -> None:
    held = held_values(model)[reader.parameter]
    set_numbers(held, weight.numpy().astype("float32" if held.dtype is None else held.dtype.numpy()))
