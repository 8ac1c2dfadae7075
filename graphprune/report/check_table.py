"""A verification as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from graphprune.export.check import Check
from graphprune.report import formatting

_WORDS = {True: "[green]holds[/]", False: "[bold red]fails[/]", None: ""}


def check_table(name: str, checks: Sequence[Check]) -> Table:
    """Return each number beside its bound.

    Args:
        name: Of the file, which is a valid model with its data in place, or there would be no numbers.
        checks: What was measured.
    """
    table = Table(title=escape(name), title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("measured", justify="right")
    table.add_column("bound", justify="right")
    table.add_column("")
    table.add_row("full check, strict shapes, external data", "", "", _WORDS[True])
    for check in checks:
        bound = ""
        if check.bound is not None:
            bound = f"{'≥' if check.at_least else '≤'} {formatting.number(check.bound)}"
        table.add_row(escape(check.name), formatting.number(check.measured), bound, _WORDS[check.holds])
    return table
