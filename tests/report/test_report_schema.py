"""report.json is read back as it was written, and nothing else is read at all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from graphprune.errors import RunFolderError
from graphprune.report.schema import Report, json_schema, read_report, write_report_json


def places_of(value: Any, kind: type, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values of a type (bool is not int here)."""
    if isinstance(value, dict):
        found = [place for key, item in value.items() for place in places_of(item, kind, (*at, key))]
        return found + ([at] if kind is dict else [])
    if isinstance(value, list):
        return [place for index, item in enumerate(value) for place in places_of(item, kind, (*at, index))]
    return [at] if type(value) is kind else []


def at(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value


def test_file_holds_what_was_given(report: Report, data: dict[str, Any], tmp_path: Path) -> None:
    write_report_json(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(data))


@given(value=st.floats(min_value=1e-300, max_value=1e300))
def test_floats_survive_bit_for_bit(
    report: Report, tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    folder = tmp_path_factory.mktemp("report")
    perplexity = report.perplexity.model_copy(update={"onnx": value})
    write_report_json(report.model_copy(update={"perplexity": perplexity}), folder / "report.json")
    assert read_report(folder / "report.json").perplexity.onnx == value


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_float_may_be_nan_or_infinite(data: dict[str, Any], bad: float) -> None:
    places = [place for place in places_of(data, float) if place[0] != "layers_quantized" or place[1] == 0]
    assert len(places) > 25
    for place in places:
        changed = copy.deepcopy(data)
        at(changed, place[:-1])[place[-1]] = bad
        with pytest.raises(ValidationError):
            Report.model_validate(changed)


def test_no_unknown_key_is_read_anywhere(data: dict[str, Any]) -> None:
    free = {("verify", "checks"), ("verify", "tolerances"), ("versions",)}
    places = [place for place in places_of(data, dict) if place not in free and place[:1] != ("recipe",)]
    assert ("stages", 3) in places
    for place in places:
        if place and place[-1] not in (0, 3) and isinstance(place[-1], int):
            continue
        changed = copy.deepcopy(data)
        at(changed, place)["surprise"] = 1
        with pytest.raises(ValidationError, match="surprise"):
            Report.model_validate(changed)


def test_no_key_may_be_missing(data: dict[str, Any]) -> None:
    for place in [
        (),
        ("perplexity",),
        ("perplexity", "protocol"),
        ("certificate",),
        ("stages", 0),
        ("widths", 0),
    ]:
        for key in at(data, place):
            if key == "schema":
                continue
            changed = copy.deepcopy(data)
            del at(changed, place)[key]
            with pytest.raises(ValidationError, match=key):
                Report.model_validate(changed)


@pytest.mark.parametrize(
    ("place", "bad"),
    [
        (("perplexity", "onnx"), 0.0),
        (("parameters", "before"), -1),
        (("parameters", "asked_share"), 1.01),
        (("certificate", "ok"), "yes"),
        (("stages", 0, "state"), "skipped"),
        (("verify", "tolerances"), {"something that was not measured": 1.0}),
        (("schema",), "graphprune.report/2"),
    ],
)
def test_values_out_of_range_are_refused(data: dict[str, Any], place: tuple[Any, ...], bad: Any) -> None:
    at(data, place[:-1])[place[-1]] = bad
    with pytest.raises(ValidationError):
        Report.model_validate(data)


def test_report_cannot_be_changed(report: Report) -> None:
    with pytest.raises(ValidationError):
        report.perplexity.onnx = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a readable report"),
        ("[]", "has the schema None"),
        ('{"schema": "graphprune.report/2"}', "graphprune.report/2"),
        ('{"schema": "graphprune.report/1"}', "'model': Field required"),
    ],
)
def test_a_foreign_file_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(RunFolderError, match=words) as caught:
        read_report(tmp_path / "other.json")
    assert "other.json" in caught.value.problem
    assert caught.value.remedy


def test_a_file_with_nan_is_refused(report: Report, tmp_path: Path) -> None:
    write_report_json(report, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text().replace("17.3921", "NaN")
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"perplexity\.dense"):
        read_report(tmp_path / "report.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        read_report(tmp_path / "report.json")


def test_json_schema_names_every_field(data: dict[str, Any]) -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(data)
    assert schema["properties"]["schema"]["const"] == "graphprune.report/1"
    assert schema["additionalProperties"] is False
    json.dumps(schema, allow_nan=False)


def test_no_field_hides_one_of_pydantic() -> None:
    assert not set(Report.model_fields) & set(dir(BaseModel))
