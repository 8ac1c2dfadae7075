"""The report as one table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graphprune.certify.certificate import Certificate
from graphprune.report import formatting
from graphprune.report.folding import Family, fold
from graphprune.report.group_document import Document
from graphprune.report.kinds import title_of
from graphprune.report.schema import Distance, Report
from graphprune.report.summary import before_after, certificate_holds, removed_words, verification_holds

_WORDS = {True: "[green]holds[/]", False: "[bold red]fails[/]", None: "not judged"}


def summary_table(report: Report) -> Table:
    """Return the before/after rows and the two verdicts, to be printed at the end of a run."""
    words = removed_words(report)
    if report.model.opened_by == "graphprune.load":
        words += f"; layers differ in width: {report.model.opened_by} opens the float model, from_pretrained does not"
    table = Table(title=escape(report.model.name), caption=escape(words))
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
    verdict, agreement = _WORDS[verification_holds(report)], report.verify.top1_agreement
    against = "its float model" if report.model.opened_by == "onnxruntime" else "torch"
    if agreement is not None:
        table.add_row(f"ONNX and {against}, same next token", "", formatting.share(agreement), verdict)
    elif report.distance is not None:
        table.add_row("Outputs moved, pruned → ONNX", *_moved(report.distance), verdict)
    return table


def _moved(distance: Distance) -> tuple[str, str]:
    return formatting.share(distance.pruned), formatting.share(distance.onnx)


def groups_table(document: Document) -> RenderableType:
    """Return the node groups as a table, those that differ in the number of their block alone as one row.

    Below it stand the reasons why groups may not lose units, by number, and how much of the model may go.

    Args:
        document: The groups, as ``groups.json`` holds them.
    """
    families = fold(document["groups"])
    reasons = list(dict.fromkeys(reason for family in families for reason in family.reasons))
    table = Table(title=escape(document["model"]), box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("node group", no_wrap=True)
    table.add_column("where", overflow="fold")
    for heading in ("×", "units", "a unit frees"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("prunable", no_wrap=True)
    for stack in sorted(dict.fromkeys(family.stack for family in families), key=lambda stack: stack != ""):
        table.add_section()
        if stack:
            table.add_row(f"[bold]{escape(stack)}[/]")
        for family in (family for family in families if family.stack == stack):
            table.add_row(*_cells(family, reasons))
    notes = [Text(f"({number}) {reason}") for number, reason in enumerate(reasons, start=1)]
    return Group(table, *notes, Text(f"\n{_reach(document)}"))


def _cells(family: Family, reasons: list[str]) -> tuple[str, ...]:
    first, many = family.first, len(family.rows)
    notes = " ".join(f"({reasons.index(reason) + 1})" for reason in family.reasons)
    return (
        escape(title_of(first["kind"])),
        escape(family.where),
        f"× {formatting.count(many)}" if many > 1 else "",
        formatting.count(first["size"]),
        formatting.count(first["parameters_per_unit"]),
        "[green]yes[/]" if first["prunable"] else f"no {notes}",
    )


def _reach(document: Document) -> str:
    groups, elements = document["groups"], document["elements"]
    prunable = sum(row["prunable"] for row in groups)
    share = formatting.share(elements["prunable"] / max(1, elements["total"]))
    return (
        f"{formatting.count(len(groups))} node groups, {formatting.count(prunable)} prunable; {share} of "
        f"{formatting.count(elements['total'])} parameters lie in units that may go."
    )


def certificate_line(certificate: Certificate) -> str:
    """Return in a line that a certificate holds, and how closely."""
    permuted, pruned = formatting.count(certificate.groups), formatting.count(certificate.pruned_groups)
    return (
        f"Certified: renumbering {permuted} groups at once moves the outputs by {certificate.permuted_max_error:.1e}; "
        f"removing units of {pruned} differs from zeroing them by {certificate.removed_max_error:.1e} "
        f"(tolerance {certificate.tolerance:.0e})."
    )
