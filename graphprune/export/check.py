"""One number of a verification, with its bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graphprune.errors import VerificationError


@dataclass(frozen=True, slots=True)
class Check:
    """What was measured, and what it may be.

    Attributes:
        name: Of the check.
        measured: The number.
        bound: The largest value that passes, or the smallest; None where the number is only told.
        at_least: Whether the bound is the smallest.
    """

    name: str
    measured: float
    bound: float | None
    at_least: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether the number is within its bound, which nan never is; None where there is no bound."""
        if self.bound is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        if self.bound is None:
            return f"{self.name} {self.measured:.3g}"
        between = (("<", ">=") if self.at_least else (">", "<="))[bool(self.holds)]
        return f"{self.name} {self.measured:.3g} {between} {self.bound:.3g}"


def raise_if_failed(name: str, checks: Iterable[Check]) -> None:
    """Raise if a check fails.

    Args:
        name: Of what was checked.
        checks: All that was measured.

    Raises:
        VerificationError: With the numbers of those that fail.
    """
    failed = [str(check) for check in checks if check.holds is False]
    if failed:
        raise VerificationError(
            f"{name} is not what it should be: {', '.join(failed)}",
            "do not use the file; export it again, and report this if it happens again",
        )
