"""LoRAPrune's schedule: nothing goes at first, then much at once and less and less, and nothing at the end."""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.errors import TrainingError


@dataclass(frozen=True, slots=True)
class CubicSchedule:
    """When which share of the units that are to go is gone.

    The released program stops pruning just below its target, since it prunes only while the share is below it; here
    the first step at which the share is whole prunes too.

    Attributes:
        steps: Steps of training in all.
        warmup: Share of them before the first unit goes.
        cooldown: Share of them after the last unit is gone.
        every: Steps from one removal to the next.

    Raises:
        TrainingError: If nothing is left between warm-up and cool-down, or there is no step.
    """

    steps: int
    warmup: float = 0.1
    cooldown: float = 0.1
    every: int = 10

    def __post_init__(self) -> None:
        shares_fit = self.warmup >= 0 and self.cooldown >= 0 and self.warmup + self.cooldown < 1
        if self.steps < 1 or self.every < 1 or not shares_fit:
            raise TrainingError(
                f"a schedule of {self.steps} steps, a removal every {self.every}, with a warm-up of {self.warmup:.0%} "
                f"and a cool-down of {self.cooldown:.0%} of them removes nothing",
                "give it at least one step, between a warm-up and a cool-down that leave something between them",
            )

    def share(self, step: int) -> float:
        """Return the share, 0 to 1, that is to be gone after a step; steps count from 1.

        Source: LoRAPrune (arXiv 2305.18403): 1 − (1 − progress)³ between warm-up and cool-down.
        """
        start, end = self.warmup * self.steps, (1 - self.cooldown) * self.steps
        if step >= end:
            return 1.0
        return 1 - (1 - max(0.0, step - start) / (end - start)) ** 3

    def is_due(self, step: int) -> bool:
        """Whether units go after a step: after every so many, and as soon as all are to be gone."""
        if self.share(step) == 1:
            return self.share(step - 1) < 1
        return self.share(step) > 0 and step % self.every == 0
