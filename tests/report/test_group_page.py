"""groups.html needs nothing but itself, and holds every group, member and reason."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from group_documents import document_of, group, make_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Traced

from graphprune.report.folding import filled
from graphprune.report.group_document import group_document
from graphprune.report.group_page import render_group_page

_VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """A page whose elements are closed in order; fails while it is read if they are not."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attrs = self._open[-1] if self._open else ("", {})
        if tag in ("script", "style"):
            key = attrs.get("id") or tag
            self.raw[key] = self.raw.get(key, "") + data
        else:
            self.text += data

    @property
    def data(self) -> Any:
        return json.loads(self.raw["data"])


def unfolded(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of groups.json, told from what the page holds."""
    rows = []
    for family in data:
        for number, place in enumerate(family["places"]):
            reason = family["reason_of"][number]
            rows.append(
                {
                    "name": filled(family["name"], tuple(place)),
                    "kind": family["kind"],
                    "size": family["size"],
                    "permutable": family["permutable"],
                    "prunable": family["prunable"],
                    "reason": None if reason is None else family["reasons"][reason],
                    "parameters_per_unit": family["parameters_per_unit"],
                    "block": family["block"][number],
                    "members": [
                        {
                            "parameter": filled(filled(member["parameter"], tuple(place)), tuple(own)),
                            **{key: member[key] for key in ("axis", "size", "per_unit", "side")},
                        }
                        for member in family["members"]
                        for own in member["places"]
                    ],
                }
            )
    return rows


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("name", "kind", "size", "permutable", "prunable", "reason", "parameters_per_unit", "block")
    member_keys = ("parameter", "axis", "size", "per_unit", "side")
    return sorted(
        (
            {key: row[key] for key in keys}
            | {"members": sorted(tuple(member[key] for key in member_keys) for member in row["members"])}
            for row in rows
        ),
        key=lambda row: str(row["name"]),
    )


@pytest.fixture(scope="module")
def page(document: dict[str, Any]) -> Page:
    return Page(render_group_page(document))


def test_nothing_is_fetched(document: dict[str, Any], page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in {"iframe", "object", "embed", "img"}
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    text = render_group_page(document).replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_data_are_the_rows(document: dict[str, Any], page: Page, adapted: Traced) -> None:
    assert ordered(unfolded(page.data)) == ordered(document["groups"])
    real = Page(render_group_page(group_document(adapted.groups, "tiny")))
    assert ordered(unfolded(real.data)) == ordered(adapted.groups.rows())


def test_every_folded_group_is_a_row_with_its_reason(document: dict[str, Any], page: Page) -> None:
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and "data-family" in attrs]
    assert [int(str(row["data-family"])) for row in rows] == sorted(family["id"] for family in page.data)
    table = Page(re.sub("<svg.*?</svg>", "", render_group_page(document), flags=re.S)).text
    for row in document["groups"]:
        assert (row["reason"] or "prunable") in table
    assert page.text.count("× 30") >= 4
    assert "134" not in page.data[0]["name"]


def test_counts_in_the_head_are_those_of_the_groups(page: Page, document: dict[str, Any]) -> None:
    assert str(len(document["groups"])) in page.text
    assert "25.0 %" in page.text  # of the hand-made document: 250 of 1,000 elements


def test_groups_of_the_picture_are_in_the_data(page: Page) -> None:
    told = {row["name"] for row in unfolded(page.data)}
    drawn = {attrs["data-group"] for tag, attrs in page.tags if "data-group" in attrs}
    assert drawn
    assert drawn <= told


def test_blocks_that_differ_have_a_picture_each() -> None:
    rows = make_groups(5)
    for row in rows:
        if row["block"] == 0:
            row["size"] += 1
    shown = Page(render_group_page(document_of(rows)))
    tabs = [attrs for tag, attrs in shown.tags if tag == "button" and "data-picture" in attrs]
    figures = [attrs for tag, attrs in shown.tags if tag == "figure"]
    assert len(tabs) == len(figures) == 2
    assert ["hidden" in attrs for attrs in figures] == [False, True]
    assert "model.layers 1–4" in shown.text
    assert "in 1–4" in shown.text


def test_many_kinds_of_block_do_not_fill_the_page() -> None:
    rows = make_groups(20)
    for row in rows:
        row["size"] += (row["block"] or 0) // 2
    shown = Page(render_group_page(document_of(rows)))
    assert sum(tag == "figure" for tag, _ in shown.tags) == 6
    assert "4 further kinds of block" in shown.text


def test_depth_costs_next_to_nothing() -> None:
    small, large = (len(render_group_page(document_of(make_groups(layers)))) for layers in (10, 100))
    assert large < small + 90 * 200
    assert large < 200_000


def test_a_model_without_groups_still_makes_a_page() -> None:
    shown = Page(render_group_page(document_of([])))
    assert shown.data == []
    assert "figure" not in {tag for tag, _ in shown.tags}


@settings(max_examples=30)
@given(
    text=st.text(max_size=30)
    | st.sampled_from(["</script><script>alert(1)</script>", '"><img src=x onerror=y>'])
)
def test_what_users_name_is_text_and_never_markup(text: str) -> None:
    rows = [group(f"{text}:ffn", f"k{text}", 4, None, [(f"{text}.weight", 0)], text or "none")]
    source = render_group_page(document_of(rows, model=text))
    shown = Page(source)
    assert {tag for tag, _ in shown.tags} <= {
        tag for tag, _ in Page(render_group_page(document_of(make_groups(3)))).tags
    }
    assert not any(name.startswith("on") for _, attrs in shown.tags for name in attrs)
    assert ordered(unfolded(shown.data)) == ordered(rows)
