"""The one error a user of `quant` can meet: it says what is wrong, where, and what to do."""

from __future__ import annotations


class QuantError(ValueError):
    """A tensor, a format, a layer or a file is not what quantization needs.

    Args:
        problem: What is wrong and where, in one sentence.
        remedy: What the reader can do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        # An error is made again from its arguments where another process raised it.
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n  → {self.remedy}"
