"""LoRAPrune: a torch optimizer that trains adapters, and takes away the units that their gradients deem unimportant."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.prune.cubic_schedule import CubicSchedule
from graphprune.prune.finite import finite_loss
from graphprune.prune.param_groups import ParameterGroups, require_units
from graphprune.saliency.effective import Gradients
from graphprune.saliency.gates import Gates
from graphprune.saliency.loraprune import importance
from graphprune.saliency.units import adapted_members
from graphprune.shrink.plan import Plan


class LoRAPrune(torch.optim.AdamW):
    """AdamW on what is trainable; beside it, units are scored in each step and masked on a cubic schedule.

    Units are ranked within their group, and each group loses the same share of its target at each removal. What is
    masked stays masked. Masks are gates of zero on the units' contributions; heads that share keys and values are one
    unit, since they are one in the node groups. Once all are gone nothing is scored any more.

    A step at a learning rate of zero changes nothing and does not count. With nothing to remove this is AdamW.

    Source: Zhang et al. 2024, "LoRAPrune" (arXiv 2305.18403).

    Args:
        params: From `param_groups`.
        schedule: When units go, such as `CubicSchedule(steps=300)`.
        lr: AdamW's learning rate.
        remove: The share of parameters to remove, 0 to 1: the same share of each kind, as in the paper.
        units: How many units each group loses by the end, in the place of `remove`.
        width_multiple: With `remove`: kept units are a multiple of this, by kind.
        exempt: Groups that stay whole. The released program exempts those of the first tenth of the layers and of the
            last one, which leaves layers of different widths; none are by default, so that all have the same.
        released: Whether importance is that of the released program; see `saliency.loraprune.importance`.
        memory: Share of the old importance that a step keeps.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's.
        on_removal: Called after units went.

    Raises:
        TrainingError: If a group is asked to lose more units than it can, or has no weight with an adapter; if an
            exempt name is that of no group that may lose units, or another optimizer's gates are on the model.
        BudgetError: If the share cannot be removed.
    """

    def __init__(
        self,
        params: ParameterGroups,
        *,
        schedule: CubicSchedule,
        lr: float = 1e-4,
        remove: float = 0.2,
        units: Mapping[str, int] | None = None,
        width_multiple: Mapping[str, int] | None = None,
        exempt: Collection[str] = (),
        released: bool = False,
        memory: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        on_removal: Callable[[], None] | None = None,
    ) -> None:
        require_units(params, type(self).__name__)
        exempt = (exempt,) if isinstance(exempt, str) else exempt
        params.possible(dict.fromkeys(exempt, 0))
        params = replace(params, prunable=tuple(g for g in params.prunable if g.name not in exempt))
        self._units = params.possible(units if units is not None else params.units(remove, width_multiple))
        super().__init__(list(params), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._schedule, self._released, self._memory = schedule, released, memory
        self._on_removal = on_removal
        self._steps = 0
        self._members = adapted_members(params.model, params.groups, self._units)
        self._importance = {name: torch.zeros(params.groups[name].size) for name in self._units}
        self.gates = Gates(params.model, params.groups, self._units)
        for gate in self.gates.values.values():
            gate.requires_grad_(False)

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole schedule, those after the last removal included."""
        return self._schedule.steps

    @property
    def steps_left(self) -> int:
        """Steps that the schedule still has to go while units do; at 0 there is a plan."""
        done = not self._units or self._schedule.share(self._steps) == 1
        return 0 if done else self.schedule_steps - self._steps

    @property
    def plan(self) -> Plan:
        """The finished plan: the units that are masked.

        Raises:
            TrainingError: If some are still to go.
        """
        if self.steps_left:
            raise TrainingError(
                f"LoRAPrune has done {self._steps} of {self.schedule_steps} steps, so there is no plan yet",
                "train on; steps at a learning rate of zero do not count",
            )
        return Plan(self.gates.redundant())

    def redundant(self, name: str) -> Tensor:
        """Return which units (units,) of a group are masked."""
        return self.gates.values[name] == 0

    @property
    def counts(self) -> dict[str, int]:
        """How many units are gone, and how many are to go."""
        gone = sum(int(self.redundant(name).sum()) for name in self._units)
        return {"zeroed": gone, "target": sum(self._units.values())}

    def close(self) -> None:
        """Take the gates off the model; do so before it is shrunk."""
        self.gates.close()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Score units by the gradients, step what is trainable, then remove what is due.

        Raises:
            TrainingError: If a gradient is not finite; nothing has been changed then.
        """
        loss = finite_loss(self, closure, self._steps, pruning=bool(self._units))
        counts = self.param_groups[0]["lr"] > 0
        if counts and self._units and self._schedule.share(self._steps) < 1:
            self._observe()
        self.gates.release()
        super().step()
        if counts:
            self._steps += 1
            if self._units and self._schedule.is_due(self._steps):
                self._remove(self._schedule.share(self._steps))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state, and with it importance, masks and place in the schedule."""
        own = {
            "units": dict(self._units),
            "schedule": asdict(self._schedule),
            "released": self._released,
            "memory": self._memory,
            "steps": self._steps,
            "importance": dict(self._importance),
            "gates": {name: gate.data for name, gate in self.gates.values.items()},
        }
        return {**super().state_dict(), "loraprune": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, settings included.

        Raises:
            TrainingError: If it is the state of another optimizer or target.
        """
        own = state_dict.get("loraprune")
        if own is None or own["units"] != self._units:
            raise TrainingError(
                f"this is not the state of LoRAPrune with units {self._units}",
                "make the optimizer with the arguments that it had",
            )
        super().load_state_dict(state_dict)
        self._schedule = CubicSchedule(**own["schedule"])
        self._released, self._memory, self._steps = own["released"], own["memory"], own["steps"]
        for name, gate in self.gates.values.items():
            self._importance[name].copy_(own["importance"][name])
            gate.copy_(own["gates"][name])

    def _observe(self) -> None:
        """Move the running mean on by this step's importance."""
        gradients = self._gradients()
        for name, score in importance(self._members, gradients, released=self._released).items():
            self._importance[name].mul_(self._memory).add_(score, alpha=1 - self._memory)

    def _gradients(self) -> Gradients:
        found = {}
        for member in self._members:
            for name, factor in member.weight.factors().items():
                found[name] = torch.zeros_like(factor) if factor.grad is None else factor.grad
        return found

    def _remove(self, share: float) -> None:
        """Mask the least important units of each group until a share of its target is gone."""
        for name, units in self._units.items():
            gate = self.gates.values[name]
            ranked = self._importance[name].to(gate.device).masked_fill(gate == 0, float("-inf"))
            gate[ranked.argsort(stable=True)[: int(units * share)]] = 0
        if self._on_removal:
            self._on_removal()
