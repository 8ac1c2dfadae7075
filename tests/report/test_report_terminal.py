"""The terminal's table says what the page says."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from graphprune.report.schema import Report
from graphprune.report.terminal import summary_table


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_holds_before_and_after(report: Report) -> None:
    text = printed(summary_table(report))
    for words in (
        "134,515,008",
        "99,125,568",
        "269.1 MB",
        "86.7 MB",
        "17.39",
        "21.13",
        "14.82",
        "31.47",
        "2.12×",
    ):
        assert words in text
    assert "26.3 % of the parameters removed, 25.0 % asked for" in text
    assert text.count("holds") == 2
    assert "fails" not in text


def test_table_says_what_fails_and_what_was_not_judged(data: dict[str, Any]) -> None:
    data["certificate"]["ok"] = False
    data["verify"]["tolerances"] = {}
    text = printed(summary_table(Report.model_validate(data)))
    assert "fails" in text
    assert "not judged" in text
    assert "holds" not in text


def test_a_name_is_no_console_markup(data: dict[str, Any]) -> None:
    data["model"]["name"] = "[red]model[/red] [/]"
    assert "[red]model[/red] [/]" in printed(summary_table(Report.model_validate(data)))
