"""Perplexity and accuracies as a table for the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from graphprune.report import formatting
from graphprune.source.evaluation import Evaluation


def evaluation_table(found: Evaluation) -> Table:
    """Return what a model was found to be worth, a row for the text and for each task."""
    text, tasks = found.text, found.tasks
    table = Table(title=escape(f"{found.model} on {found.provider}"), title_justify="left")
    table.add_column("")
    for heading in ("measured", "±", "per character"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("of")
    if text is not None:
        words = f"{formatting.count(text.tokens)} tokens of {text.text.rpartition('/')[2]}, windows of {text.window}"
        table.add_row("perplexity", formatting.number(text.perplexity), "", "", escape(words))
    for name, accuracy in tasks.items():
        table.add_row(
            escape(name),
            formatting.share(accuracy.right),
            formatting.share(accuracy.standard_error),
            formatting.share(accuracy.normalised),
            f"{formatting.count(accuracy.count)} questions, chance {formatting.share(accuracy.chance)}",
        )
    if len(tasks) > 1:
        table.add_section()
        mean = sum(row.right for row in tasks.values()) / len(tasks)
        normalised = sum(row.normalised for row in tasks.values()) / len(tasks)
        table.add_row("mean", formatting.share(mean), "", formatting.share(normalised), f"{len(tasks)} tasks")
    return table
