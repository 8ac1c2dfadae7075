"""LHSPG's schedule: warm-up, then periods in which units fade."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from graphprune.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Schedule:
    """When units become redundant and when they are gone.

    Attributes:
        warmup_steps: Steps before the first unit becomes redundant.
        periods: Number of periods.
        period_steps: Steps of a period.

    Raises:
        TrainingError: If there is no period, or a period has no step, or a number is not whole.
    """

    warmup_steps: int
    periods: int
    period_steps: int

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            if number % 1:
                raise TrainingError(f"{name} is {number}, and a schedule is made of whole steps", "round it")
        if self.warmup_steps < 0 or self.periods < 1 or self.period_steps < 1:
            raise TrainingError(
                f"a schedule of {self.warmup_steps} warm-up steps and {self.periods} periods of "
                f"{self.period_steps} steps removes nothing",
                "give it at least one period of one step",
            )

    @property
    def steps(self) -> int:
        """Steps until every unit of the target is gone."""
        return self.warmup_steps + self.periods * self.period_steps

    def place(self, step: int) -> tuple[int, int] | None:
        """Return the period of a step, and how many of its steps are left, this one counted; None outside."""
        if not self.warmup_steps <= step < self.steps:
            return None
        period, within = divmod(step - self.warmup_steps, self.period_steps)
        return period, self.period_steps - within

    def due(self, units: int, period: int) -> int:
        """Return how many of a group's units are redundant in a period: K/P more in each, K in the last."""
        return round(units * (period + 1) / self.periods)
