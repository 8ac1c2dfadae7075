"""The report as one table for the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from graphprune.report import formatting
from graphprune.report.schema import Report
from graphprune.report.summary import before_after, certificate_holds, verification_holds

_WORDS = {True: "[green]holds[/]", False: "[bold red]fails[/]", None: "not judged"}


def summary_table(report: Report) -> Table:
    """Return the before/after rows and the two verdicts, to be printed at the end of a run."""
    removed, asked = report.parameters.removed_share, report.parameters.asked_share
    table = Table(
        title=escape(report.model.name),
        caption=f"{formatting.share(removed)} of the parameters removed, {formatting.share(asked)} asked for",
    )
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for row in before_after(report):
        table.add_row(row.title, row.before_text, row.after_text, row.change)
    table.add_section()
    certificate = formatting.number(
        max(report.certificate.permuted_max_error, report.certificate.removed_max_error)
    )
    table.add_row("Certificate, greatest error", "", certificate, _WORDS[certificate_holds(report)])
    agreement = formatting.share(report.verify.top1_agreement)
    table.add_row("ONNX and torch, same next token", "", agreement, _WORDS[verification_holds(report)])
    return table
