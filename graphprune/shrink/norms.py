"""RMSNorms whose width shrinks: their own code divides by the new width, which weight and eps make up for.

With n units of which n' are left, mean'(x²) = mean(x²) · n / n', so that

    w · x / √(mean(x²) + eps)  =  w · √(n / n') · x / √(mean'(x²) + eps · n / n').

Where the weight enters as 1 + w, the new weight is (1 + w) · √(n / n') − 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout, atoms_of, find
from graphprune.coupling.selection import Indices
from graphprune.errors import ShrinkError
from graphprune.trace.graph import Operator


@dataclass(frozen=True, slots=True)
class _Norm:
    """A module that takes a mean over a width that shrinks.

    Attributes:
        module: Qualified name.
        ratio: n / n'.
        eps: What is added to the mean.
        axis: The width's layout.
        from_one: Whether the weight enters as 1 + w.
    """

    module: str
    ratio: float
    eps: float | None
    axis: Layout
    from_one: bool


def compensate_norms(model: nn.Module, groups: NodeGroups, kept: Mapping[str, Indices]) -> None:
    """Rescale weight and eps of every norm in a sliced module whose width shrank.

    Args:
        model: The sliced module, changed in place.
        groups: The node groups of the original.
        kept: Units that stay, by group name.

    Raises:
        ShrinkError: If the operators of a norm ran in no module that can be found by its name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for norm in {norm.module: norm for norm in _norms(groups, kept)}.values():
        owner = modules.get(norm.module)
        if owner is None:
            raise ShrinkError(
                f"the norm in {norm.module} is in no module of that name, so that its eps cannot be rescaled",
                "take the traced graph, shrink(..., form='graph'), or prune other kinds of groups",
            )
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and value == norm.eps:
                setattr(owner, name, value * norm.ratio)
        with torch.no_grad():
            for name, weight in owner.named_parameters(recurse=False):
                axes = groups.axes(f"{norm.module}.{name}") or []
                if len(axes) == 1 and find(axes[0]) is find(norm.axis):
                    one = 1.0 if norm.from_one else 0.0
                    weight.copy_((weight + one) * math.sqrt(norm.ratio) - one)


def _norms(groups: NodeGroups, kept: Mapping[str, Indices]) -> Iterator[_Norm]:
    selection = groups.selection(kept)
    by_module: dict[str, list[Operator]] = {}
    for operator in groups.graph.operators:
        by_module.setdefault(operator.module, []).append(operator)
    for operator in groups.graph.operators:
        if not operator.target.startswith(("aten.mean", "aten.rms_norm")) or not operator.module:
            continue
        source = operator.inputs[0]
        (axis, *more) = _reduced(operator, groups.axes(source.name) or [])
        if more or not any(atom.identity in selection for atom in atoms_of(axis)):
            continue
        beside = by_module[operator.module]
        yield _Norm(
            module=operator.module,
            ratio=axis.size / len(groups.keep(axis, selection)),
            eps=_eps(operator, beside),
            axis=axis,
            from_one=any(_adds_one(other) for other in beside),
        )


def _reduced(operator: Operator, axes: list[Layout]) -> list[Layout]:
    if operator.target.startswith("aten.rms_norm"):
        return axes[-len(operator["normalized_shape"]) :]
    return [axes[dim] for dim in operator["dim"] or range(len(axes))]


def _eps(mean: Operator, beside: list[Operator]) -> float | None:
    if mean["eps"] is not None:
        return float(mean["eps"])
    results = {value.name for value in mean.outputs if value is not None}
    for operator in beside:
        if operator.target.startswith("aten.add") and operator.inputs[0].name in results:
            return operator["other"] if isinstance(operator["other"], float) else None
    return None


def _adds_one(operator: Operator) -> bool:
    """Whether an operator adds one to something as wide as a weight: 1 + w."""
    return (
        operator.target.startswith("aten.add")
        and operator["other"] == 1
        and len(operator.inputs[0].shape) == 1
    )
