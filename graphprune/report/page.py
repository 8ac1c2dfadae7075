"""``report.html``: one page that needs nothing but itself, for a reader who was not there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from graphprune.errors import RunFolderError
from graphprune.files import write_text
from graphprune.report import formatting, summary
from graphprune.report.schema import GroupSummary, Report, write_report_json
from graphprune.report.yaml_text import as_yaml

_SHOWN_IN_PLACE = ("groups", "widths", "distribution", "training", "recovery")


def render_report(report: Report, pictures: Mapping[str, str]) -> str:
    """Return the page as HTML.

    Args:
        report: What is shown. All of its texts are escaped: names and generations are data, not markup.
        pictures: SVG by name, from `graphprune.report.pictures`; an empty one is left out. ``groups``,
            ``widths``, ``distribution``, ``training`` and ``recovery`` stand beside their tables, others at the end.
    """
    drawn = {name: svg[svg.index("<svg") :] for name, svg in pictures.items() if svg}
    return template("report.html.j2").render(
        report=report,
        rows=summary.before_after(report),
        verdict=summary.verdict(report),
        other_unit=summary.other_unit(report),
        certificate_checks=summary.certificate_checks(report),
        verify_checks=summary.verify_checks(report),
        certificate_holds=summary.certificate_holds(report),
        verification_holds=summary.verification_holds(report),
        perplexities=_perplexities(report),
        kinds=_by_kind(report),
        layers=sorted(report.layers_quantized, key=lambda layer: -layer.error_after),
        recipe=as_yaml(report.recipe),
        pictures=drawn,
        more_pictures=[name for name in drawn if name not in _SHOWN_IN_PLACE],
    )


def write_report(
    folder: Path, report: Report, pictures: Mapping[str, str], paths: Mapping[str, str] | None = None
) -> None:
    """Write ``report.json`` and ``report.html`` into `folder`, each whole or not at all.

    Args:
        folder: Created if need be.
        report: What is written.
        pictures: SVG by name, as for `render_report`.
        paths: Where to keep a picture as a file of its own, by name, relative to `folder`.

    Raises:
        RunFolderError: A path in `paths` leads out of `folder`.
    """
    for name, place in (paths or {}).items():
        relative = PurePosixPath(place)
        if relative.is_absolute() or ".." in relative.parts:
            raise RunFolderError(
                f"the picture '{name}' would be written to {place}", "keep it inside the run folder"
            )
        if pictures.get(name):
            write_text(folder / relative, pictures[name] + "\n")
    page = render_report(report, pictures)
    write_report_json(report, folder / "report.json")
    write_text(folder / "report.html", page)


def template(name: str) -> Template:
    """Return a template of a page; it escapes what it shows."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("graphprune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(formatting, name)
        for name in ("count", "number", "share", "size", "duration", "times", "against_dense")
    }
    return environment


def _perplexities(report: Report) -> list[tuple[str, float]]:
    """Return the perplexities in the order in which the run came by them."""
    perplexity = report.perplexity
    if perplexity is None:
        return []
    between = {
        "quantize": ("after quantization", perplexity.quantized),
        "recover": ("after recovery", perplexity.recovered),
    }
    done = [stage.name for stage in report.stages if stage.name in between]
    middle = [between[name] for name in dict.fromkeys([*done, *between])]
    return [
        ("dense model", perplexity.dense),
        ("after pruning", perplexity.pruned),
        *((title, value) for title, value in middle if value is not None),
        ("ONNX in onnxruntime", perplexity.onnx),
    ]


def _by_kind(report: Report) -> list[dict[str, Any]]:
    """Return the groups' summaries by kind, with how many groups of the kind are prunable."""
    kinds: dict[str, list[GroupSummary]] = {}
    for group in report.groups:
        kinds.setdefault(group.kind, []).append(group)
    return [
        {
            "kind": kind,
            "rows": rows,
            "count": sum(row.count for row in rows),
            "prunable_text": _prunable_text(rows),
        }
        for kind, rows in kinds.items()
    ]


def _prunable_text(rows: list[GroupSummary]) -> str:
    prunable = sum(row.count for row in rows if row.prunable)
    if prunable == sum(row.count for row in rows):
        return "prunable"
    if prunable:
        return f"{formatting.count(prunable)} of them prunable"
    reasons = {row.reason or "no reason given" for row in rows}
    return f"not prunable: {reasons.pop()}" if len(reasons) == 1 else "not prunable, for several reasons"
