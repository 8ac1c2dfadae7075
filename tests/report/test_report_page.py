"""The page shows the report's own numbers, runs nothing, and fetches nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from group_documents import document_of, group
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphprune.errors import RunFolderError
from graphprune.export.verify import Verification
from graphprune.report import formatting
from graphprune.report.group_picture import group_picture
from graphprune.report.page import render_report, write_report
from graphprune.report.pictures import training_picture, widths_picture
from graphprune.report.schema import Report, read_report
from graphprune.report.summary import before_after, verify_checks
from graphprune.report.yaml_text import as_yaml

VOID = {"meta", "link", "br", "hr", "img", "input"}
NAMES = st.text(max_size=30) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "</title><script>alert(1)</script>",
        '" onload="alert(1)',
        "'><img src=x onerror=alert(1)>",
        "</pre></details><iframe src=//example.org>",
        "{{ 7 * 7 }}",
        "名前 🦙 ü",
        "&lt;b&gt; & $x^2$ \\frac",
    ]
)


class Page(HTMLParser):
    """Collects tags, attributes, data elements and text; fails on tags that do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "data":
            self.numbers.append((dict(attrs)["value"] or "", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] == "data":
            value, text = self.numbers[-1]
            self.numbers[-1] = (value, text + data)


def pictures_of(report: Report, document: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, str]:
    return {
        "groups": group_picture(document, f"Block 0 of {report.model.name}"),
        "widths": widths_picture(report.widths),
        "training": training_picture(metrics),
    }


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.fixture(scope="module")
def pictures(report: Report, document: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, str]:
    return pictures_of(report, document, metrics)


@pytest.fixture(scope="module")
def page(report: Report, pictures: dict[str, str]) -> Page:
    return Page(render_report(report, pictures))


@settings(max_examples=40, deadline=None)
@given(name=NAMES, prompt=NAMES, limit=NAMES, reason=NAMES, key=NAMES)
def test_what_users_name_is_text_and_never_markup(
    report: Report, page: Page, name: str, prompt: str, limit: str, reason: str, key: str
) -> None:
    hostile = report.model_copy(
        update={
            "model": report.model.model_copy(update={"name": name, "source": name, "architecture": name}),
            "generations": tuple(
                entry.model_copy(update={"prompt": prompt, "dense": prompt, "compact": prompt})
                for entry in report.generations
            ),
            "limits": (limit, *report.limits[1:]),
            "groups": tuple(
                entry.model_copy(update={"kind": f"{entry.kind}{reason}", "reason": reason})
                for entry in report.groups
            ),
            "command": name,
            "recipe": {"text": prompt, "name": name, key + "key": [limit]},
            "verify": report.verify.model_copy(update={"checks": {key + "check": 0.5}, "tolerances": {}}),
        }
    )
    shown, usual = Page(render_report(hostile, {})), page
    ours = {tag for tag, _ in usual.tags}
    assert "script" not in ours
    assert {tag for tag, _ in shown.tags} <= ours
    attributes = {name for _, attrs in usual.tags for name in attrs}
    assert {name for _, attrs in shown.tags for name in attrs} <= attributes
    visible = shown.text.replace("\r\n", "\n").replace("\r", "\n")
    assert prompt.replace("\r\n", "\n").replace("\r", "\n") in visible or "\0" in prompt


@settings(max_examples=8, deadline=None)
@given(name=NAMES)
def test_hostile_names_in_pictures_are_text_too(report: Report, name: str) -> None:
    row = group(name, name, 4, None, [(f"a.{name}.weight", 0)], name)
    picture = group_picture(document_of([row]), name)
    tags = {tag for tag, _ in Page(render_report(report, {"groups": picture})).tags}
    assert not tags & {"script", "img", "iframe", "b"}


def test_nothing_is_fetched_and_nothing_runs(page: Page, report: Report, pictures: dict[str, str]) -> None:
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img"}
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attrs.get(name) or "#").startswith("#")
    text = render_report(report, pictures)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_identifiers_are_unique_and_references_lead_somewhere(
    page: Page, report: Report, pictures: dict[str, str]
) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", render_report(report, pictures))
    used += [attrs["xlink:href"][1:] for _, attrs in page.tags if attrs.get("xlink:href")]
    assert used
    assert set(used) <= set(ids)


def test_every_number_shown_is_in_the_json(page: Page, report: Report) -> None:
    known = {repr(leaf) for leaf in leaves(report.model_dump()) if isinstance(leaf, int | float)}
    assert len(page.numbers) > 400
    assert {value for value, _ in page.numbers} <= known


def test_every_number_of_the_json_is_shown(page: Page, report: Report) -> None:
    shown = {value for value, _ in page.numbers}
    hidden = {
        "schema_name",
        "widths",
        "recipe",
        "layers_quantized",
    }  # widths are drawn, shapes and recipe are text
    expected = [leaf for leaf in leaves(report.model_dump(exclude=hidden)) if type(leaf) in (int, float)]
    expected += [
        error for layer in report.layers_quantized for error in (layer.error_before, layer.error_after)
    ]
    assert {repr(leaf) for leaf in expected} <= shown


def test_a_budget_says_what_it_counts(data: dict[str, Any]) -> None:
    data["budget"] = {"unit": "kv_bytes", "asked_share": 0.3, "removed_share": 0.2987}
    text = " ".join(Page(render_report(Report.model_validate(data), {})).text.split())
    wanted = "30.0 % of the bytes of the key-value cache asked for, 29.9 % reached."
    assert f"26.3 % of the parameters removed; {wanted}" in text
    data["budget"]["unit"] = "parameters"
    text = " ".join(Page(render_report(Report.model_validate(data), {})).text.split())
    assert "26.3 % of the parameters removed, 25.0 % asked for." in text


def test_the_knowledge_distribution_stands_beside_what_was_removed(report: Report) -> None:
    page = render_report(report, {"distribution": '<svg id="heat"></svg>', "other": '<svg id="rest"></svg>'})
    assert page.count('id="heat"') == 1
    assert page.index("What was removed") < page.index('id="heat"') < page.index("How it went")
    assert page.index("How it went") < page.index('id="rest"')
    assert "how much the loss rises when each group alone loses" in page


def test_the_text_of_a_number_is_its_value_rounded(page: Page) -> None:
    scale = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "%": 0.01, "B": 1, "s": 1}
    judged = 0
    for value, text in page.numbers:
        clean = text.replace(",", "")
        if " min " in clean:
            minutes, _, seconds, _ = clean.split()
            assert int(minutes) * 60 + int(seconds) == round(float(value))
            continue
        digits, _, unit = clean.partition(" ")
        step = scale.get(unit, 1)
        assert float(digits) * step == pytest.approx(float(value), rel=6e-3, abs=0.0501 * step if unit else 0)
        judged += 1
    assert judged > 400


def test_key_rows_hold_the_first_and_the_last_of_each(report: Report) -> None:
    assert [(row.before, row.after) for row in before_after(report)] == [
        (report.parameters.before, report.parameters.after),
        (report.bytes.source, report.bytes.onnx),
        (report.perplexity.dense, report.perplexity.onnx),
        (report.tokens_per_second.dense_onnx_fp32, report.tokens_per_second.compact_onnx),
    ]


def test_changes_are_those_of_the_numbers(page: Page, report: Report) -> None:
    text = " ".join(page.text.split())
    before, after = report.parameters.before, report.parameters.after
    assert f"−{100 * (before - after) / before:.1f} %" in text
    assert f"−{100 * (1 - report.bytes.onnx / report.bytes.source):.1f} %" in text
    assert (
        f"+{100 * (report.perplexity.onnx - report.perplexity.dense) / report.perplexity.dense:.1f} %" in text
    )
    assert f"{report.tokens_per_second.compact_onnx / report.tokens_per_second.dense_onnx_fp32:.2f}×" in text


def test_layers_stand_worst_first(page: Page, report: Report) -> None:
    names = [
        layer.name
        for layer in sorted(report.layers_quantized, key=lambda layer: layer.error_after, reverse=True)
    ]
    assert re.findall(r"model\.layers\.\d+\.(?:mlp|self_attn)\.\w+_proj(?![\w.])", page.text) == names


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({}, []),
        ({"certificate": {"ok": False}}, ["certificate"]),
        ({"certificate": {"removed_max_error": 2e-4}}, ["certificate"]),
        ({"verify": {"top1_agreement": 0.97}}, ["verification"]),
        ({"verify": {"kl": 0.011}}, ["verification"]),
        (
            {"certificate": {"permuted_max_error": 1.0}, "verify": {"max_abs_error": 1.0}},
            ["certificate", "verification"],
        ),
    ],
)
def test_one_bad_check_turns_the_verdict(
    data: dict[str, Any], change: dict[str, Any], fails: list[str]
) -> None:
    for part, values in change.items():
        data[part] |= values
    page = Page(render_report(Report.model_validate(data), {}))
    red = [attrs for tag, attrs in page.tags if tag == "span" and attrs.get("class") == "fails"]
    assert ("Do not use this model" in page.text) == bool(fails)
    assert ("every check of the certificate and of the ONNX model holds" in page.text) == (not fails)
    assert ("the certificate of the node groups" in page.text) == ("certificate" in fails)
    assert ("the verification of the ONNX model" in page.text) == ("verification" in fails)
    assert len(red) >= 2 * len(fails)
    assert bool(red) == bool(fails)


def test_without_bounds_nothing_is_claimed(data: dict[str, Any]) -> None:
    data["verify"]["tolerances"] = {}
    text = Page(render_report(Report.model_validate(data), {})).text
    assert "measured without a bound" in text
    assert "every check" not in text


def test_an_empty_run_still_makes_a_page(data: dict[str, Any]) -> None:
    for key in ("stages", "groups", "widths", "generations", "layers_quantized", "limits"):
        data[key] = []
    data["recipe"] = {}
    pictures = {
        "groups": group_picture(document_of([]), "none"),
        "widths": widths_picture([]),
        "training": training_picture([]),
    }
    page = Page(render_report(Report.model_validate(data), pictures))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert "figure" not in {tag for tag, _ in page.tags}


def test_generations_keep_their_first_line_break(report: Report, pictures: dict[str, str]) -> None:
    # A browser drops one line break directly after <pre>.
    dense = report.generations[1].dense
    assert dense.startswith("\n")
    assert f"<pre>\n{dense.replace('<', '&lt;')}</pre>" in render_report(report, pictures)


def test_folder_holds_page_json_and_pictures(
    report: Report, pictures: dict[str, str], tmp_path: Path
) -> None:
    paths = {"groups": "graph/groups.svg", "training": "training/curves.svg"}
    write_report(tmp_path / "run", report, pictures | {"training": ""}, paths)
    assert read_report(tmp_path / "run" / "report.json") == report
    expected = render_report(report, pictures | {"training": ""})
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == expected
    assert (tmp_path / "run" / "graph" / "groups.svg").read_text(encoding="utf-8").strip() == pictures[
        "groups"
    ].strip()
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"run/report.json", "run/report.html", "run/graph/groups.svg"}


@pytest.mark.parametrize("place", ["../outside.svg", "/tmp/outside.svg", "graph/../../outside.svg"])
def test_no_picture_leaves_the_folder(
    report: Report, pictures: dict[str, str], tmp_path: Path, place: str
) -> None:
    with pytest.raises(RunFolderError, match="groups"):
        write_report(tmp_path / "run", report, pictures, {"groups": place})
    assert list(tmp_path.iterdir()) == []


RECIPES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(value=st.dictionaries(st.text(max_size=8), RECIPES, max_size=5))
@example(value={"learning_rate": 1e-05, "no": "yes", "text": "a\u2028\x85b"})
def test_the_recipe_shown_is_yaml_of_the_recipe(value: dict[str, Any]) -> None:
    assert yaml.safe_load(as_yaml(value)) == value


@given(value=st.floats(min_value=1e-12, max_value=1e12))
def test_numbers_are_rounded_and_not_changed(value: float) -> None:
    text = formatting.number(value)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=6e-3)
    assert len(text) <= 11


@given(value=st.integers(min_value=0, max_value=10**14))
def test_sizes_are_in_decimal_units(value: int) -> None:
    digits, unit = formatting.size(value).split()
    assert unit == "TB" or float(digits) < 1000
    scale = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert float(digits.replace(",", "")) * scale == pytest.approx(value, abs=0.0501 * scale)


@given(seconds=st.floats(min_value=0, max_value=3e5))
def test_durations_add_up(seconds: float) -> None:
    parts = formatting.duration(seconds).split()
    total = sum(
        float(n) * {"s": 1, "min": 60, "h": 3600}[unit]
        for n, unit in zip(parts[::2], parts[1::2], strict=True)
    )
    assert abs(total - seconds) <= (60 if "h" in parts else 1)
    assert all(float(n) < 60 for n, unit in zip(parts[::2], parts[1::2], strict=True) if unit != "h")


def test_every_check_of_an_export_is_told_in_words(data: dict[str, Any]) -> None:
    found = Verification(
        max_abs_error=0.1,
        top1_agreement=1.0,
        kl=0.0,
        tokens=2,
        tolerance=1e-4,
        checks=dict.fromkeys(
            (
                "weights",
                "weight_rounding",
                "prefill",
                "padded_batch",
                "decode",
                "greedy",
                "greedy_agreement",
                "adapter",
                "adapter_of_another_base",
                "1x1 after 0",
                "3x12 after 7",
            ),
            0.0,
        ),
    )
    data["verify"] |= {"checks": found.checks, "tolerances": {}}
    titles = {check.name for check in verify_checks(Report.model_validate(data))}
    assert len(titles) == len(found.rows)
    assert not titles & {row.name for row in found.rows}
    assert {"1 text of 1 token, 0 in the cache", "3 texts of 12 tokens, 7 in the cache"} <= titles
