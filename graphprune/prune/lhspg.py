"""LHSPG: the LoRA half-space projected gradient, a torch optimizer that trains adapters and takes units away.

LoRAShear (arXiv 2310.18356, algorithm 4 and equation 2) drives the weights x of redundant units to zero while
adapters learn: x̃ = x + γBA − λ x/‖x‖, then a half-space projection. Two modes do so:

- *gated*: x is the unit's gate, one scalar on its contribution. The end is the same, exact zeros; but the decay is
  truly linear (rows of gate and up scaled together fade as their product), W stays as it is until the end, so that a
  quantized base works and undoing is free, and the gate's gradient says what the unit is worth.
- *paper*: x is the unit's weights, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.prune.fading import Fading
from graphprune.prune.finite import finite_loss
from graphprune.prune.gated_mode import GatedMode
from graphprune.prune.paper_mode import PaperChoices, PaperMode
from graphprune.prune.param_groups import ParameterGroups, require_units
from graphprune.prune.schedule import Schedule
from graphprune.saliency.gates import Gates
from graphprune.shrink.plan import Plan

Mode = Literal["gated", "paper"]


class LHSPG(torch.optim.AdamW):
    """AdamW on what is trainable; beside it, periods in which the least salient units fade to exactly zero.

    After `warmup_steps`, each of `periods` periods picks its share of the target from the units that are still
    important, and over `period_steps` steps takes λ = ‖x‖ / (steps left) off them, which is the λ that reaches zero
    at the period's end by a straight line. A unit whose trial value leaves the half-space ⟨x̃, x⟩ > ε‖x‖² is
    projected to zero at once. Units are judged by a running mean of their saliency, along the path.

    A step at a learning rate of zero changes nothing and does not count. With nothing to remove this is AdamW.

    Args:
        params: From `param_groups`: the model's trainable parameters, and the units that may go.
        lr: AdamW's learning rate.
        remove: The share of parameters to remove, 0 to 1.
        units: How many units each group loses by the end, in the place of `remove`.
        width_multiple: With `remove`: kept units are a multiple of this, by kind; see `ParameterGroups.units`.
        mode: ``gated`` or ``paper``.
        paper: What the paper leaves open, for its mode alone; None for what `PaperChoices` takes.
        warmup_steps: Steps before the first unit becomes redundant.
        periods: Number of periods.
        period_steps: Steps of a period.
        half_space: ε of the projection, from 0 to below 1; larger projects earlier.
        scores: Saliency to start from, by group; None for zeros.
        memory: Share of the old saliency that a step keeps.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's.
        on_period: Called when a period has chosen its units, before they fade.

    Raises:
        TrainingError: If a group is asked to lose more units than it can, the mode cannot work on this model, or
            another optimizer's gates are on it.
        BudgetError: If the share cannot be removed.
    """

    def __init__(
        self,
        params: ParameterGroups,
        *,
        lr: float = 3e-4,
        remove: float = 0.2,
        units: Mapping[str, int] | None = None,
        width_multiple: Mapping[str, int] | None = None,
        mode: Mode = "gated",
        paper: PaperChoices | None = None,
        warmup_steps: int = 8,
        periods: int = 4,
        period_steps: int = 10,
        half_space: float = 0.0,
        scores: Mapping[str, Tensor] | None = None,
        memory: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        on_period: Callable[[], None] | None = None,
    ) -> None:
        require_units(params, type(self).__name__)
        _check(half_space, memory)
        self._schedule = Schedule(warmup_steps, periods, period_steps)
        wanted = units if units is not None else params.units(remove, width_multiple)
        self._units = params.possible(wanted)
        self._half_space, self._memory, self._on_period = half_space, memory, on_period
        self._steps = 0
        super().__init__(list(params), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._mode = mode
        device = params.trainable[0].device
        sizes = {name: params.groups[name].size for name in self._units}
        for name, size in sizes.items():
            if scores and (name not in scores or scores[name].shape != (size,)):
                raise TrainingError(
                    f"scores has no {size} numbers for the units of '{name}'",
                    "give one tensor for each group",
                )
        self._fading = self._faded_by(mode, params, paper)
        if self._fading.parameters:
            self.add_param_group({"params": self._fading.parameters, "lr": 0.0, "weight_decay": 0.0})
        first = {name: scores[name] if scores else torch.zeros(size) for name, size in sizes.items()}
        self._saliency = {
            name: score.detach().to(device, torch.float32, copy=True) for name, score in first.items()
        }
        self._redundant = {
            name: torch.zeros(size, dtype=torch.bool, device=device) for name, size in sizes.items()
        }

    @property
    def schedule_steps(self) -> int:
        """Steps until every unit of the target is gone."""
        return self._schedule.steps

    @property
    def steps_left(self) -> int:
        """Steps that the schedule still has to go; at 0 there is a plan."""
        return max(0, self.schedule_steps - self._steps) if self._units else 0

    @property
    def gates(self) -> Gates:
        """The gates, for a teacher (within ``gates.opened()`` the model is un-pruned) or a repair.

        Raises:
            TrainingError: In paper mode, which has none.
        """
        if not isinstance(self._fading, GatedMode):
            raise TrainingError("LHSPG's paper mode has no gates", "use mode='gated'")
        return self._fading.gates

    @property
    def plan(self) -> Plan:
        """The finished plan: the units that are zero.

        Raises:
            TrainingError: If the schedule has steps to go.
        """
        if self.steps_left:
            raise TrainingError(
                f"LHSPG has {self.steps_left} of {self.schedule_steps} steps to go, so there is no plan yet",
                "train on; steps at a learning rate of zero do not count",
            )
        return Plan(
            {name: torch.nonzero(mask).flatten().tolist() for name, mask in self._fading.zeroed().items()}
        )

    def redundant(self, name: str) -> Tensor:
        """Return which units (units,) of a group are redundant, faded or still fading."""
        return self._redundant[name]

    @property
    def counts(self) -> dict[str, int]:
        """How many units are redundant, how many of them are gone, and how many are to go."""
        return {
            "redundant": sum(int(mask.sum()) for mask in self._redundant.values()),
            "zeroed": sum(int(mask.sum()) for mask in self._fading.zeroed().values()),
            "target": sum(self._units.values()),
        }

    def close(self) -> None:
        """Take the gates off the model; do so before it is shrunk."""
        self._fading.close()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Observe gradients, step what is trainable, then move the schedule on by one step.

        Raises:
            TrainingError: If a gradient is not finite; nothing has been changed then.
        """
        loss = finite_loss(self, closure, self._steps, pruning=bool(self._units))
        for name, observed in self._fading.observe().items():
            self._saliency[name].mul_(self._memory).add_(observed, alpha=1 - self._memory)
        super().step()
        if self.param_groups[0]["lr"] > 0:
            self._advance()
        self._fading.hold()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state, and with it all that pruning has changed: gates, or weights in paper mode."""
        return {
            **super().state_dict(),
            "lhspg": {
                "mode": self._mode,
                "units": dict(self._units),
                "schedule": asdict(self._schedule),
                "half_space": self._half_space,
                "memory": self._memory,
                "steps": self._steps,
                "saliency": dict(self._saliency),
                "redundant": dict(self._redundant),
                "tensors": self._fading.tensors(),
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, settings included, and put the model where it was.

        Raises:
            TrainingError: If it is the state of another optimizer, mode or target.
        """
        own = state_dict.get("lhspg")
        if own is None or own["mode"] != self._mode or own["units"] != self._units:
            found = "another optimizer" if own is None else f"mode '{own['mode']}' and units {own['units']}"
            raise TrainingError(
                f"this is the state of {found}, not of LHSPG in mode '{self._mode}' with units {self._units}",
                "make the optimizer with the arguments that it had",
            )
        super().load_state_dict(state_dict)
        self._schedule = Schedule(**own["schedule"])
        self._half_space, self._memory, self._steps = own["half_space"], own["memory"], own["steps"]
        for kind, kept in (
            ("saliency", self._saliency),
            ("redundant", self._redundant),
            ("tensors", self._fading.tensors()),
        ):
            for name, tensor in kept.items():
                tensor.copy_(own[kind][name])

    def _faded_by(self, mode: Mode, params: ParameterGroups, paper: PaperChoices | None) -> Fading:
        if mode == "gated":
            if paper is not None:
                raise TrainingError("paper is of the paper mode alone", "leave it out, or give mode='paper'")
            return GatedMode(params, self._units)
        if mode == "paper":
            return PaperMode(params, self._units, paper or PaperChoices(), self._forget)
        raise TrainingError(f"LHSPG has no mode '{mode}'", "there are gated and paper")

    def _forget(self, parameter: nn.Parameter) -> None:
        """Drop AdamW's moments of a parameter; it starts afresh at the next step."""
        self.state.pop(parameter, None)

    def _advance(self) -> None:
        place = self._schedule.place(self._steps)
        self._steps += 1
        if place is None or not self._units:
            return
        period, steps_left = place
        if steps_left == self._schedule.period_steps:
            for name, units in self._units.items():
                self._condemn(name, self._schedule.due(units, period))
            if self._on_period:
                self._on_period()
        self._fading.fade(self._redundant, steps_left, self._half_space)
        if steps_left == 1:
            self._fading.end_period()

    def _condemn(self, name: str, due: int) -> None:
        """Move the least salient important units to the redundant set until `due` are in it."""
        redundant = self._redundant[name]
        missing = due - int(redundant.sum())
        if missing > 0:
            saliency = self._saliency[name].masked_fill(redundant, float("inf"))
            redundant[saliency.argsort(stable=True)[:missing]] = True


def _check(half_space: float, memory: float) -> None:
    if not 0 <= half_space < 1:
        raise TrainingError(f"half_space is {half_space}", "ε of the projection is at least 0 and below 1")
    if not 0 <= memory <= 1:
        raise TrainingError(f"memory is {memory}", "a share of the old saliency is 0 to 1; at 1 scores stay")
