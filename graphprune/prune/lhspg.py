"""LHSPG: the LoRA half-space projected gradient, on gates.

LoRAShear (arXiv 2310.18356, algorithm 4 and equation 2) drives the weights x of redundant units to zero while
adapters learn: x̃ = x + γBA − λ x/‖x‖, then a half-space projection. Here x is the unit's gate, one scalar on its
contribution. The end is the same, exact zeros; but the decay is truly linear (rows of gate and up scaled together
fade as their product), W stays as it is until the end, so that a quantized base works and undoing is free, and the
γBA term needs no place: adapters act on the important units, which is where the knowledge goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.saliency.gates import Gates


class LHSPG(torch.optim.AdamW):
    """AdamW on adapters; on gates, periods in which the least salient units fade to exactly zero.

    After `warmup_steps`, each of `periods` periods picks its share of the target from the units that are still
    important, and over `period_steps` steps takes λ = x / (steps left) off their gates, which is the λ that
    reaches zero at the period's end by a straight line. A gate whose trial value leaves the half-space
    ⟨x̃, x⟩ ≥ ε‖x‖² is projected to zero at once.

    Saliency is a running mean of squared gate gradients, so that units are judged along the path.

    Args:
        adapters: Trainable parameters.
        gates: Gates on the groups to prune.
        units: How many units each group loses by the end.
        lr: AdamW's learning rate.
        warmup_steps: Steps before the first unit becomes redundant.
        periods: Number of periods.
        period_steps: Steps of a period.
        half_space: ε of the projection, 0 to 1; larger projects earlier.
        scores: Saliency to start from, by group; None for zeros.
        memory: Share of the old saliency that a step keeps.
        weight_decay: AdamW's, on the adapters.
        on_period: Called when a period has chosen its units, before they fade.

    Raises:
        TrainingError: If a group is asked to lose more units than it has.
    """

    def __init__(
        self,
        adapters: Iterable[nn.Parameter],
        gates: Gates,
        units: Mapping[str, int],
        *,
        lr: float = 3e-4,
        warmup_steps: int = 8,
        periods: int = 4,
        period_steps: int = 10,
        half_space: float = 0.0,
        scores: Mapping[str, Tensor] | None = None,
        memory: float = 0.9,
        weight_decay: float = 0.0,
        on_period: Callable[[], None] | None = None,
    ) -> None:
        for name, count in units.items():
            if not 0 <= count < gates.groups[name].size:
                raise TrainingError(
                    f"'{name}' has {gates.groups[name].size} units and cannot lose {count}",
                    "lower the target",
                )
        self._gates = gates
        self._units = dict(units)
        self._on_period = on_period
        super().__init__([{"params": list(adapters)}], lr=lr, weight_decay=weight_decay)
        self.add_param_group(
            {
                "params": list(gates.values.values()),
                "lr": 0.0,
                "steps": 0,
                "warmup_steps": warmup_steps,
                "periods": periods,
                "period_steps": period_steps,
                "half_space": half_space,
                "memory": memory,
            }
        )
        for name, gate in gates.values.items():
            first = scores[name] if scores else torch.zeros_like(gate)
            self.state[gate] = {
                "step": torch.zeros(()),  # AdamW looks for it in every state that it loads
                "saliency": first.detach().clone().to(gate),
                "redundant": torch.zeros_like(gate.data),  # 0 or 1: loading casts states to the gate's dtype
            }

    @property
    def schedule_steps(self) -> int:
        """Steps until every unit of the target is gone."""
        schedule = self.param_groups[-1]
        return int(schedule["warmup_steps"] + schedule["periods"] * schedule["period_steps"])

    def redundant(self, name: str) -> Tensor:
        """Return which units (units,) of a group are redundant, faded or still fading."""
        mask: Tensor = self.state[self._gates.values[name]]["redundant"].bool()
        return mask

    @property
    def counts(self) -> dict[str, int]:
        """How many units are redundant, how many of them are gone, and how many are to go."""
        redundant = sum(int(self.state[gate]["redundant"].sum()) for gate in self._gates.values.values())
        zeroed = sum(int((gate.detach() == 0).sum()) for gate in self._gates.values.values())
        return {"redundant": redundant, "zeroed": zeroed, "target": sum(self._units.values())}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Observe the gates' gradients, step the adapters, then move the schedule on by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._observe()
        super().step()
        self._advance()
        return loss

    def _observe(self) -> None:
        memory = self.param_groups[-1]["memory"]
        for name, gradient in self._gates.gradients().items():
            saliency = self.state[self._gates.values[name]]["saliency"]
            saliency.mul_(memory).add_(gradient.square(), alpha=1 - memory)

    def _advance(self) -> None:
        schedule = self.param_groups[-1]
        step = schedule["steps"] - schedule["warmup_steps"]
        schedule["steps"] += 1
        if not 0 <= step < schedule["periods"] * schedule["period_steps"]:
            return
        period, within = divmod(step, schedule["period_steps"])
        if within == 0:
            for name, gate in self._gates.values.items():
                self._condemn(gate, round(self._units.get(name, 0) * (period + 1) / schedule["periods"]))
            if self._on_period:
                self._on_period()
        for gate in self._gates.values.values():
            self._fade(gate, schedule["period_steps"] - within, schedule["half_space"])

    def _condemn(self, gate: nn.Parameter, due: int) -> None:
        """Move the least salient important units to the redundant set until `due` are in it."""
        redundant = self.state[gate]["redundant"]
        missing = due - int(redundant.sum())
        if missing > 0:
            saliency = self.state[gate]["saliency"].masked_fill(redundant.bool(), float("inf"))
            redundant[saliency.argsort(stable=True)[:missing]] = 1

    def _fade(self, gate: nn.Parameter, steps_left: int, half_space: float) -> None:
        """Take the period's λ off redundant gates and project those that leave the half-space."""
        redundant = self.state[gate]["redundant"].bool()
        value = gate.data
        trial = value - value / steps_left
        gone = trial * value <= half_space * value.square()
        value.copy_(torch.where(redundant, torch.where(gone, torch.zeros_like(trial), trial), value))
