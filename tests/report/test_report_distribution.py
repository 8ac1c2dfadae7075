"""The heat maps' headings have room, and a loss that falls is not called a rise."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

from graphprune.report.distribution_picture import distribution_picture

SVG = "{http://www.w3.org/2000/svg}"


def rows(kind: str, rise: float) -> list[dict[str, Any]]:
    path = "base_model.model.model.layers.{}.self_attn.some_projection.base_layer.weight:{}"
    return [
        {"name": path.format(n, kind), "kind": kind, "size": 8, "removed": [2, 4], "rises": [rise, rise / 2]}
        for n in range(3)
    ]


def headings(picture: str) -> tuple[str, str]:
    """Return the kind and what is said of it."""
    shown = ["".join(node.itertext()) for node in ET.fromstring(picture).iter(f"{SVG}text")]
    (words,) = (text for text in shown if "nats a token" in text)
    (kind,) = (text for text in shown if text.startswith("a_kind"))
    return kind, words


def test_headings_do_not_meet() -> None:
    """In bold at ten points a letter is up to eight wide, at eight and a half five and a half; there are 660."""
    kind, words = headings(distribution_picture(rows("a_kind_" + "x" * 80, 0.5)))
    assert 8 * len(kind) + 5 * len(words) < 660
    assert re.match(r"at most \+0\.5 nats a token, base_model.*…", words)


def test_a_loss_that_falls_is_no_rise() -> None:
    _, words = headings(distribution_picture(rows("a_kind", -0.02)))
    assert words == "nowhere worse than dense: 0.01 nats a token less, or more"
