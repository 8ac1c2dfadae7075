"""A file's graph with quantized products as they are defined, where a file's own are rounded to be fast."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}
"""Settings of a session that does not round activations where it fuses standard operators."""


def exact_graph(path: Path) -> bytes:
    """Return a file's graph without leave to round activations; its data stays where it is."""
    model = ir.load(path)
    for node in model.graph:
        node.attributes.pop("accuracy_level", None)
    return ir.to_proto(model).SerializeToString()
