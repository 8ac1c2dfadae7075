"""The four files that show node groups: for programs, for a browser, for a talk, and for graph tools."""

from __future__ import annotations

from pathlib import Path

from graphprune.files import write_json, write_text
from graphprune.report.group_document import Document
from graphprune.report.group_graph import write_graphml
from graphprune.report.group_page import main_picture, render_group_page

GROUP_FILES = ("groups.json", "groups.html", "groups.svg", "groups.graphml")

_NO_PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="420" height="60" role="img"><title>no node groups</title>'
    '<text x="24" y="36" font-family="sans-serif" font-size="14">The model has no node groups.</text></svg>'
)


def write_groups(document: Document, folder: Path) -> None:
    """Write ``groups.json``, ``groups.html``, ``groups.svg`` and ``groups.graphml``, each whole or not at all.

    Args:
        document: From `group_document`.
        folder: Created if need be.
    """
    page, picture = render_group_page(document), main_picture(document) or _NO_PICTURE
    write_json(folder / "groups.json", document)
    write_text(folder / "groups.html", page)
    write_text(folder / "groups.svg", picture + "\n")
    write_graphml(document, folder / "groups.graphml")
