"""The report in a few lines: before and after, the checks, and the verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from graphprune.export.check import Check
from graphprune.report import formatting
from graphprune.report.schema import Report

_TITLES = {
    "max_abs_error": "Logits of the ONNX model, greatest difference",
    "top1_agreement": "Next token agrees",
    "kl": "KL divergence of the next-token distribution",
    "adapter_of_another_base": "Adapter file of another base",
    "adapter": "Adapter file against the adapters",
    "weights": "Packed weights, greatest difference over absmax",
    "weight_rounding": "Rounding of their levels, likewise",
    "prefill": "Whole texts, exact activations",
    "padded_batch": "Texts padded to one length",
    "decode": "Token by token, from the cache",
    "shared_cache": "Token by token, in a cache that is written where it lies",
    "greedy": "Greedy text, how far a token is behind torch's choice",
    "greedy_agreement": "Greedy tokens of the file as shipped that torch would choose",
    "outputs": "Outputs with exact activations, greatest difference over the largest number",
    "rounding": "Outputs as shipped, likewise",
    "not_finite": "Whether an output is not finite",
}


_SHAPE = re.compile(r"(\d+)x(\d+) after (\d+)")

_UNITS = {
    "bytes": "bytes on disk",
    "kv_bytes": "bytes of the key-value cache",
    "latency": "measured latency",
    "macs": "multiply-accumulates",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A quantity before and after; the texts are formatted, the values are the report's own."""

    title: str
    before: float
    after: float
    before_text: str
    after_text: str
    change: str


def before_after(report: Report) -> list[Row]:
    """Return the rows that everyone asks for: parameters, bytes, and of a decoder perplexity and speed."""
    parameters, size = report.parameters, report.bytes
    rows = [
        Row(
            title="Parameters",
            before=parameters.before,
            after=parameters.after,
            before_text=formatting.count(parameters.before),
            after_text=formatting.count(parameters.after),
            change=formatting.change(parameters.before, parameters.after),
        ),
        Row(
            title="Bytes on disk, source → ONNX",
            before=size.source,
            after=size.onnx,
            before_text=formatting.size(size.source),
            after_text=formatting.size(size.onnx),
            change=formatting.change(size.source, size.onnx),
        ),
    ]
    return [*rows, *_of_a_decoder(report)]


def _of_a_decoder(report: Report) -> Iterator[Row]:
    perplexity, speed = report.perplexity, report.tokens_per_second
    if perplexity is not None:
        yield Row(
            title="Perplexity, dense → ONNX",
            before=perplexity.dense,
            after=perplexity.onnx,
            before_text=formatting.number(perplexity.dense),
            after_text=formatting.number(perplexity.onnx),
            change=formatting.change(perplexity.dense, perplexity.onnx),
        )
    if speed is not None:
        yield Row(
            title="Tokens per second, dense fp32 ONNX → ONNX",
            before=speed.dense_onnx_fp32,
            after=speed.compact_onnx,
            before_text=formatting.number(speed.dense_onnx_fp32),
            after_text=formatting.number(speed.compact_onnx),
            change=formatting.times(speed.compact_onnx / speed.dense_onnx_fp32),
        )


def removed_words(report: Report) -> str:
    """Return how much was removed and how much was asked for, each with what it is a share of."""
    removed = f"{formatting.share(report.parameters.removed_share)} of the parameters removed"
    budget, unit = report.budget, other_unit(report)
    if unit is None:
        return f"{removed}, {formatting.share(report.parameters.asked_share)} asked for"
    return (
        f"{removed}; {formatting.share(budget.asked_share)} of the {unit} asked for, "
        f"{formatting.share(budget.removed_share)} reached"
    )


def other_unit(report: Report) -> str | None:
    """Return in words what the budget counts; None where that is parameters."""
    unit = report.budget.unit
    return None if unit == "parameters" else _UNITS.get(unit, unit)


def certificate_checks(report: Report) -> list[Check]:
    """Return the two numbers of the certificate with their tolerance."""
    certificate = report.certificate
    return [
        Check(
            name="Units permuted, greatest change of the output",
            measured=certificate.permuted_max_error,
            bound=certificate.tolerance,
        ),
        Check(
            name="Zeroed units removed, greatest change of the output",
            measured=certificate.removed_max_error,
            bound=certificate.tolerance,
        ),
    ]


def verify_checks(report: Report) -> list[Check]:
    """Return the measures of the ONNX model against the model that it was exported from."""
    verify = report.verify
    measures = {
        "max_abs_error": verify.max_abs_error,
        "top1_agreement": verify.top1_agreement,
        "kl": verify.kl,
    }
    return [
        Check(
            name=_title(name),
            measured=measured,
            bound=verify.tolerances.get(name),
            at_least=name == "top1_agreement",
        )
        for name, measured in (measures | verify.checks).items()
        if measured is not None
    ]


def _title(check: str) -> str:
    shape = _SHAPE.fullmatch(check)
    if shape is None:
        return _TITLES.get(check, check)
    texts, tokens, past = map(int, shape.groups())
    return f"{_counted(texts, 'text')} of {_counted(tokens, 'token')}, {past} in the cache"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def certificate_holds(report: Report) -> bool:
    """Return whether the certificate says that it holds and its numbers agree."""
    return report.certificate.ok and all(check.holds for check in certificate_checks(report))


def verification_holds(report: Report) -> bool | None:
    """Return whether all bounds on the ONNX model are kept; None where the report sets no bound."""
    judged = [check.holds for check in verify_checks(report) if check.holds is not None]
    return all(judged) if judged else None


def verdict(report: Report) -> str:
    """Return the report in one sentence, with its numbers; a failed check comes before all else."""
    parameters, size = report.parameters, report.bytes
    numbers = (
        f"{report.model.name} lost {formatting.share(parameters.removed_share)} of its parameters and went "
        f"from {formatting.size(size.source)} to {formatting.size(size.onnx)}{_quality_and_speed(report)}"
    )
    failed = []
    if not certificate_holds(report):
        failed.append("the certificate of the node groups")
    if verification_holds(report) is False:
        failed.append("the verification of the ONNX model")
    if failed:
        return f"Do not use this model: {' and '.join(failed)} failed. {numbers}."
    if verification_holds(report) is None:
        return f"{numbers}; the certificate holds, and the ONNX model was measured without a bound."
    return f"{numbers}; every check of the certificate and of the ONNX model holds."


def _quality_and_speed(report: Report) -> str:
    perplexity, speed, distance = report.perplexity, report.tokens_per_second, report.distance
    words = ""
    if perplexity is not None:
        before, after = formatting.number(perplexity.dense), formatting.number(perplexity.onnx)
        words += f"; perplexity went from {before} to {after}"
    if distance is not None:
        words += f"; its outputs moved by {formatting.share(distance.onnx)} of the largest"
    if speed is not None:
        change = formatting.times(speed.compact_onnx / speed.dense_onnx_fp32)
        words += f"; decoding runs at {change} the speed of the dense model"
    return words
