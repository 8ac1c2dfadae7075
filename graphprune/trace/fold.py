"""Small integer tensors whose numbers follow from the traced program alone, such as a constant list of indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

_FEW = 4096  # elements


def known_numbers(program: ExportedProgram) -> dict[str, Tensor]:
    """Return the known integer tensors of a program, by the name of their node.

    Args:
        program: As ``torch.export.export`` returns it.
    """
    known: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        constant = program.constants.get(spec.target or "")
        if spec.kind is InputKind.CONSTANT_TENSOR and isinstance(constant, Tensor) and _is_known(constant):
            known[spec.arg.name] = constant
    for node in program.graph.nodes:
        if _can_be_folded(node, known):
            result = node.target(
                *fx.node.map_arg(node.args, lambda source: known[source.name]),
                **fx.node.map_arg({**node.kwargs, **_on_cpu(node)}, lambda source: known[source.name]),
            )
            if _is_known(result):
                known[node.name] = result
    return known


def _can_be_folded(node: fx.Node, known: dict[str, Tensor]) -> bool:
    example = node.meta.get("val")
    schema = getattr(node.target, "_schema", None)
    return (
        isinstance(example, Tensor)
        and _is_small_integer(example)
        and schema is not None
        and not schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]
        and all(source.name in known for source in node.all_input_nodes)
    )


def _on_cpu(node: fx.Node) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if node.kwargs.get("device") is not None else {}


def _is_small_integer(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        return False
    return all(isinstance(size, int) for size in tensor.shape) and tensor.numel() <= _FEW


def _is_known(tensor: Tensor) -> bool:
    return _is_small_integer(tensor) and not tensor.is_meta and not isinstance(tensor, FakeTensor)
