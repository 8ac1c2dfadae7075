"""What each round of recovery trained on and reached, which was the best, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Round:
    """The model after a round.

    Attributes:
        phase: ``text`` or ``instruct``.
        number: In its phase; 0 is the model as the phase found it.
        step: Optimizer steps done so far, in all.
        mix: Share of each source that was trained on; empty for number 0.
        losses: On each source's held-out windows, in nats per token.
        degradation: The same above the dense model's.
    """

    phase: str
    number: int
    step: int
    mix: Mapping[str, float]
    losses: Mapping[str, float]
    degradation: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean degradation over all sources."""
        return sum(self.degradation.values()) / len(self.degradation)

    def row(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def best_round(rounds: Sequence[Round]) -> int:
    """Return the place of the round with the least mean degradation, the earliest if several have it."""
    return min(range(len(rounds)), key=lambda place: rounds[place].mean)


def is_exhausted(
    rounds: Sequence[Round], sources: Sequence[str], *, least_improvement: float, patience: int
) -> bool:
    """Return whether no source improved by more than `least_improvement` in the last `patience` rounds.

    An improvement is one on the source's least degradation of all rounds before them.

    Args:
        rounds: Of one phase, from its number 0 on.
        sources: Names of those that the phase trains on.
        least_improvement: In nats per token.
        patience: Rounds.
    """
    before, recent = rounds[:-patience], rounds[-patience:]
    if not before:
        return False
    return all(_least(before, source) - _least(recent, source) <= least_improvement for source in sources)


def _least(rounds: Sequence[Round], source: str) -> float:
    return min(round_.degradation[source] for round_ in rounds)
