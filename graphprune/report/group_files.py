"""The four files that show node groups: for programs, for a browser, for a talk, and for graph tools."""

from __future__ import annotations

from pathlib import Path

from graphprune.files import write_json, write_text
from graphprune.report.group_document import Document
from graphprune.report.group_graph import write_graphml
from graphprune.report.group_page import main_picture, render_group_page

GROUP_FILES = ("groups.json", "groups.html", "groups.svg", "groups.graphml")


def write_groups(document: Document, folder: Path) -> None:
    """Write ``groups.json``, ``groups.html``, ``groups.svg`` and ``groups.graphml``, each whole or not at all.

    Args:
        document: From `group_document`.
        folder: Created if need be.
    """
    page, picture = render_group_page(document), main_picture(document)
    write_json(folder / "groups.json", document)
    write_text(folder / "groups.html", page)
    write_text(folder / "groups.svg", picture + "\n")
    write_graphml(document, folder / "groups.graphml")
