"""The errors a user can meet: each says what is wrong, where, and what to do.

Every message has the form ``what happened (with names and numbers)`` followed by a line ``→ what to do``.
The command line prints the message alone and exits with the class's `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphPruneError(Exception):
    """Base of everything that graphprune raises on purpose.

    Args:
        problem: What is wrong and where, in one sentence.
        remedy: What the reader can do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str) -> None:
        # An error is made again from its arguments where another process raised it.
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n  → {self.remedy}"


class RecipeError(GraphPruneError, ValueError):
    """The recipe or a command-line flag is wrong; the message names the key and its line."""

    exit_code = 2

    @classmethod
    def unknown(cls, what: str, name: str, known: Iterable[str], key: str = "") -> RecipeError:
        """Return the error for a name that nothing has; it says which is meant, or which there are.

        Args:
            what: What should have it, such as "saliency".
            name: As it was given.
            known: Names that there are.
            key: The recipe's key, if the message is to begin with it.
        """
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(names)}"
        return cls(f"{key}{': ' if key else ''}there is no {what} '{name}'", hint)


class SourceError(GraphPruneError, ValueError):
    """A model or a text could not be opened, or is not what the recipe needs."""

    exit_code = 2


class RunFolderError(GraphPruneError, RuntimeError):
    """The output folder is in use, foreign, or belongs to another recipe."""

    exit_code = 2


class TraceError(GraphPruneError, RuntimeError):
    """The model could not be traced into an operator graph."""

    exit_code = 3


class TraceWarning(UserWarning):
    """A model was traced with less than it could have: for its example's sizes alone, or without some numbers."""


class CouplingError(GraphPruneError, RuntimeError):
    """Node groups were asked for something that they do not hold."""

    exit_code = 3


class NothingPrunableError(GraphPruneError, ValueError):
    """No group may lose a unit; the message lists each reason once, with how many groups it holds for."""

    exit_code = 3

    @classmethod
    def because(cls, reasons: Iterable[tuple[str, str]]) -> NothingPrunableError:
        """Return the error that lists each reason once, the most frequent first.

        Args:
            reasons: The name of each group, with why it may not lose units.
        """
        groups: dict[str, list[str]] = {}
        for name, reason in reasons:
            groups.setdefault(reason, []).append(name)
        lines = [
            f"{reason} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
            for reason, names in sorted(groups.items(), key=lambda item: -len(item[1]))
        ]
        count = sum(map(len, groups.values()))
        return cls(
            "\n  - ".join((f"none of the {count} node groups may lose units", *lines)),
            "an operator that has no rule yet can be given one: graphprune.rule",
        )


class InputsError(GraphPruneError, ValueError):
    """Example inputs do not fit the model that was traced."""

    exit_code = 3


class BudgetError(GraphPruneError, ValueError):
    """The share of parameters asked for cannot be removed; the message says what can."""

    exit_code = 3


class ShrinkError(GraphPruneError, RuntimeError):
    """The plan could not be applied to the model, which is left as it was."""

    exit_code = 3


class OperatorShrinkError(ShrinkError):
    """An operator of an ONNX graph cannot be told of smaller weights.

    Args:
        operator: Its name.
        problem: What is wrong.
        remedy: What the reader can do about it.
    """

    def __init__(self, operator: str, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.args = operator, problem, remedy
        self.operator = operator


class RefusedWidthsError(ShrinkError):
    """The stock configuration can say the smaller model's widths, and refuses them."""


class UndescribedWidthsError(ShrinkError):
    """No setting of the stock configuration describes the smaller model."""


class ShrinkWarning(UserWarning):
    """A model was shrunk as its traced graph, because its own code does not follow its smaller weights."""


class TrainingError(GraphPruneError, RuntimeError):
    """Training diverged or could not start."""

    exit_code = 3


class QuantizationError(GraphPruneError, RuntimeError):
    """Weights could not be quantized as the recipe asks."""

    exit_code = 3


class ExportError(GraphPruneError, RuntimeError):
    """The model could not be written as ONNX."""

    exit_code = 4


class ExportWarning(UserWarning):
    """A model was written as ONNX with less than it could have: a weight that a session unpacks to float32."""


class VerificationError(GraphPruneError, RuntimeError):
    """A result differs from its reference; the message holds the numbers."""

    exit_code = 4
