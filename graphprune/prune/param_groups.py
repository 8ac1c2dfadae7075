"""What LHSPG is given in the place of parameter groups: what trains, and the units that may go."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.node_group import NodeGroup
from graphprune.errors import BudgetError, TrainingError
from graphprune.prune.budget import allot, score_curves, targets
from graphprune.prune.costs import Measured, cost_named
from graphprune.shrink.gated import is_gated

KINDS = ("ffn", "attention_heads")
_GREATEST_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class ParameterGroups:
    """A model's trainable parameters, and beside them the units that may go.

    Iterating gives parameter groups as every optimizer of torch takes them.

    Attributes:
        model: The model.
        groups: Its node groups.
        prunable: Those that may lose units.
        trainable: The parameters that are trained.
        counted: Names of the parameters that a share to remove is a share of.
    """

    model: nn.Module
    groups: NodeGroups
    prunable: tuple[NodeGroup, ...]
    trainable: tuple[nn.Parameter, ...]
    counted: frozenset[str]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"params": list(self.trainable)}

    def units(self, remove: float, width_multiple: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return how many units each group loses for a share of the parameters to go.

        Groups of one kind and size lose the same number; all kinds lose the same share of their parameters, as
        nearly as can be.

        Args:
            remove: Share of the parameters, from 0 to below 1.
            width_multiple: Kept units are a multiple of this, by kind. None for the largest power of two that is
                no more than 64 and a sixteenth of the group.

        Raises:
            BudgetError: If that share cannot be removed, which says what can, or a multiple is for no kind here.
        """
        if not 0 <= remove < 1:
            raise BudgetError(f"remove is {remove}", "give the share of parameters to remove: 0.2 for 20 %")
        if remove == 0:
            return {}
        present = {group.kind for group in self.prunable}
        for kind, multiple in (width_multiple or {}).items():
            if kind not in present or multiple < 1:
                raise BudgetError(
                    f"width_multiple gives '{kind}' a multiple of {multiple}",
                    f"give one of at least 1, by kind; the kinds that lose units are {', '.join(sorted(present))}",
                )
        names = [group.name for group in self.prunable]
        budget = allot(
            self.groups,
            score_curves({group.name: even_scores(group) for group in self.prunable}),
            cost_named("parameters", Measured(self.groups, self.counted), names),
            remove=remove,
            width_multiple=width_multiple if width_multiple is not None else _multiples(self.prunable),
        )
        return dict(budget.removed_units)

    def possible(self, units: Mapping[str, int]) -> dict[str, int]:
        """Return the groups that lose units, each with how many.

        Args:
            units: By group name.

        Raises:
            TrainingError: If a group may not lose units, or not so many.
        """
        prunable = {group.name: group for group in self.prunable}
        for name, count in units.items():
            if name not in prunable:
                raise TrainingError(
                    f"'{name}' is not among the groups that may lose units", "see param_groups(kinds=...)"
                )
            group = prunable[name]
            if count % 1 or not 0 <= count <= group.size - group.minimum:
                raise TrainingError(
                    f"'{name}' has {group.size} units and cannot lose {count}: {group.minimum} must stay",
                    "give a whole number, and no more than that",
                )
        return {name: int(count) for name, count in units.items() if count}


def param_groups(
    model: nn.Module,
    groups: NodeGroups,
    kinds: Collection[str] = KINDS,
    counted: Collection[str] | None = None,
) -> ParameterGroups:
    """Return what `LHSPG` optimizes: a model's trainable parameters, with the units that may go.

    Args:
        model: A model, its adapters attached, on the device that it trains on; what requires no gradient is not
            trained.
        groups: Node groups of this very model.
        kinds: Kinds of groups that may lose units.
        counted: Names of the parameters that a share to remove is a share of. None for those that are frozen,
            which are the base of a model with adapters, or for all if none is.

    Raises:
        RecipeError: If a kind names no group.
        NothingPrunableError: If none of the groups may be pruned.
        TrainingError: If nothing is trainable, or the groups are those of another model.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    trainable = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    if not trainable:
        raise TrainingError("no parameter of the model is trainable", "attach adapters to it first")
    prunable = tuple(targets(groups, (kinds,) if isinstance(kinds, str) else kinds))
    for group in prunable:
        for member in group.members:
            if member.role == "parameter" and member.parameter not in named:
                raise TrainingError(
                    f"the groups name a parameter '{member.parameter}', which the model does not have",
                    "trace the model with its adapters attached: node_groups(trace(model, example_inputs))",
                )
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    return ParameterGroups(
        model, groups, prunable, trainable, frozenset(frozen or named if counted is None else counted)
    )


def require_units(params: Any, optimizer: str) -> None:
    """Check that an optimizer was given `param_groups` of a model that no other is pruning.

    Raises:
        TrainingError: If not.
    """
    if not isinstance(params, ParameterGroups):
        raise TrainingError(
            f"{optimizer} needs to know which units there are, and was given a {type(params).__name__}",
            f"{optimizer}(param_groups(model, groups), ...)",
        )
    if is_gated(params.model):
        raise TrainingError(
            f"the model has the gates of another optimizer on it, and {optimizer} would mistake what they leave for it",
            "call close() on that optimizer first, or load the model anew",
        )


def _multiples(groups: Collection[NodeGroup]) -> dict[str, int]:
    multiples: dict[str, int] = {}
    for group in groups:
        fitting = 1 << max(0, (group.size // 16).bit_length() - 1)
        multiples[group.kind] = min(multiples.get(group.kind, _GREATEST_MULTIPLE), fitting)
    return multiples


def even_scores(group: NodeGroup) -> Tensor:
    """Return scores whose sum grows so steeply with the share lost that it is least where all lose alike."""
    rank = torch.arange(1, group.size + 1, dtype=torch.float64)
    return group.parameters_per_unit * (rank / group.size) ** 3
