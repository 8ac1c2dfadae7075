"""The four files are written whole or not at all, and other programs read them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from group_documents import document_of, group

from graphprune.report import group_files
from graphprune.report.group_files import GROUP_FILES, write_groups
from graphprune.report.group_graph import membership_graph


def test_the_four_files_and_nothing_else(document: dict[str, Any], tmp_path: Path) -> None:
    write_groups(document, tmp_path / "graph")
    assert {path.name for path in (tmp_path / "graph").iterdir()} == set(GROUP_FILES)
    assert json.loads((tmp_path / "graph" / "groups.json").read_text(encoding="utf-8")) == document
    assert ET.parse(tmp_path / "graph" / "groups.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (tmp_path / "graph" / "groups.html").stat().st_size < 1_000_000


def test_graphml_comes_back_as_it_was(document: dict[str, Any], tmp_path: Path) -> None:
    write_groups(document, tmp_path)
    read = nx.read_graphml(tmp_path / "groups.graphml", force_multigraph=True)
    ours = membership_graph(document)
    assert dict(read.nodes(data=True)) == dict(ours.nodes(data=True))
    edges = [
        sorted((tuple(sorted((a, b))), sorted(d.items())) for a, b, d in graph.edges(data=True))
        for graph in (read, ours)
    ]
    assert edges[0] == edges[1]
    assert {
        (row["name"], member["parameter"], member["axis"], member["per_unit"])
        for row in document["groups"]
        for member in row["members"]
    } == {
        (read.nodes[a]["label"], read.nodes[b]["label"], d["axis"], d["indices_per_unit"])
        for a, b, d in (
            (a, b, d) if read.nodes[a]["type"] == "group" else (b, a, d) for a, b, d in read.edges(data=True)
        )
    }


def test_one_parameter_in_two_axes_is_two_edges() -> None:
    rows = [group("g", "hidden", 4, None, [("w", 0), ("w", 1)])]
    assert membership_graph(document_of(rows)).number_of_edges() == 2


def test_a_name_that_xml_forbids_is_written_all_the_same(tmp_path: Path) -> None:
    rows = [group("a\x00b", "ffn", 4, None, [("w\x01", 0)], "because\x02")]
    write_groups(document_of(rows), tmp_path)
    assert len(nx.read_graphml(tmp_path / "groups.graphml")) == 2


def test_a_failure_leaves_the_earlier_files(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_groups(document, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(*_: object, **__: object) -> None:
        Path(str(_[1])).write_text("half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(nx, "write_graphml", broken)
    with pytest.raises(OSError, match="no space left"):
        write_groups(document, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_groups_are_no_reason_to_fail(tmp_path: Path) -> None:
    write_groups(document_of([]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(group_files.GROUP_FILES)
    assert ET.parse(tmp_path / "groups.svg").getroot().tag.endswith("svg")
