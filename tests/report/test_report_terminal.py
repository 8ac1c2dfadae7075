"""The terminal's table says what the page says."""

from __future__ import annotations

import io
from typing import Any

from group_documents import document_of, group, make_groups
from rich.console import Console, RenderableType

from graphprune.report.schema import Report
from graphprune.report.terminal import groups_table, summary_table


def printed(table: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
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


def test_groups_of_all_blocks_are_one_row() -> None:
    text = printed(groups_table(document_of(make_groups(30), "A model")), width=80)
    lines = text.splitlines()
    ffn = next(line for line in lines if line.split()[:1] == ["ffn"])
    assert ffn.split() == ["ffn", "mlp", "×", "30", "1,536", "1,728", "yes"]
    assert sum("× 30" in line for line in lines) == 4
    assert lines[0].strip() == "A model"
    assert "122 node groups, 90 prunable; 25.0 % of 1,000 parameters lie in units" in " ".join(text.split())


def test_every_reason_stands_below_the_table_under_its_number() -> None:
    reasons = ["opaque [red]operator[/]", "a lookup reads its rows by number"]
    rows = [group(f"g{i}:ffn", "ffn", 8, None, [(f"g{i}.w", 0)], reason) for i, reason in enumerate(reasons)]
    lines = [line.split() for line in printed(groups_table(document_of(rows)), width=80).splitlines()]
    assert [line[-2:] for line in lines if line[:1] == ["ffn"]] == [["no", "(1)"], ["no", "(2)"]]
    for number, reason in enumerate(reasons, start=1):
        assert [f"({number})", *reason.split()] in lines


def test_a_budget_says_what_it_counts(data: dict[str, Any]) -> None:
    data["budget"] = {"unit": "latency", "asked_share": 0.3, "removed_share": 0.2987}
    data["model"]["opened_by"] = "graphprune.load"
    text = " ".join(printed(summary_table(Report.model_validate(data)), width=300).split())
    assert (
        "26.3 % of the parameters removed; 30.0 % of the measured latency asked for, 29.9 % reached; layers differ in "
        "width: graphprune.load opens the float model, from_pretrained does not"
    ) in text
    data["budget"]["unit"] = "parameters"
    text = printed(summary_table(Report.model_validate(data)), width=300)
    assert "26.3 % of the parameters removed, 25.0 % asked for" in text
