"""Scores of units of an ONNX graph, from its initializers and from what they read; nothing needs a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from graphprune.certify.onnx_session import OnnxSession, as_arrays
from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout, find
from graphprune.coupling.node_group import NodeGroup
from graphprune.errors import RecipeError, TrainingError
from graphprune.saliency.activations import Consumed, InputMoments
from graphprune.saliency.flap import flap_scores
from graphprune.saliency.units import Place, Scores
from graphprune.saliency.wanda import wanda_scores
from graphprune.shrink.onnx_weights import held_values, numbers_in
from graphprune.trace.graph import Operator, Value

ONNX_SALIENCIES = ("flap", "magnitude", "wanda")
_FROM_ACTIVATIONS: Mapping[str, Callable[[Iterable[Consumed]], Scores]] = {
    "flap": flap_scores,
    "wanda": wanda_scores,
}


@dataclass(frozen=True, slots=True)
class Reader:
    """An initializer that is multiplied with an activation.

    Attributes:
        parameter: Its name.
        axis: Its axis that is summed over.
        source: The activation's name.
        dim: The activation's axis that is summed over.
        weight: Its numbers.
    """

    parameter: str
    axis: int
    source: str
    dim: int
    weight: Tensor

    def tokens(self, activation: Any) -> Tensor:
        """Return an activation as (tokens, indices)."""
        return torch.from_numpy(np.moveaxis(activation, self.dim, -1)).flatten(0, -2)


@dataclass(frozen=True, slots=True)
class ConsumedInitializer:
    """An initializer that reads units, with the moments of what it reads."""

    reader: Reader
    places: tuple[Place, ...]
    moments: InputMoments

    def column_sums(self, elements: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sums (indices,) of a function of the weight over what each index is multiplied by."""
        return elements(self.reader.weight.movedim(self.reader.axis, -1).flatten(0, -2)).sum(0)


def onnx_scores(
    saliency: str,
    model: ir.Model,
    groups: NodeGroups,
    names: Iterable[str],
    batches: Iterable[Mapping[str, Any]] = (),
) -> Scores:
    """Score units of an ONNX graph.

    Args:
        saliency: ``magnitude``, ``wanda`` or ``flap``.
        model: The graph that `groups` were read off.
        groups: Its node groups.
        names: The groups to score.
        batches: Calibration inputs, each as arrays or tensors by name; magnitude looks at none.

    Returns:
        Scores (units,) by group; larger means keep.

    Raises:
        RecipeError: If there is no such saliency for ONNX graphs.
        TrainingError: If weights are codes, there is no batch, or nothing that reads a group's units can be observed.
        InputsError: If an input is missing, or there is none of that name.
    """
    chosen = [groups[name] for name in names]
    if saliency == "magnitude":
        return _magnitudes(model, groups, chosen)
    if saliency not in _FROM_ACTIVATIONS:
        raise RecipeError.unknown("saliency of ONNX graphs", saliency, ONNX_SALIENCIES)
    readers = readers_of(model, groups, chosen)
    moments = summed(model, readers, batches, InputMoments.of)
    return _FROM_ACTIVATIONS[saliency](
        ConsumedInitializer(reader, _places(groups, chosen, reader), moments[reader.source])
        for reader in readers
    )


def readers_of(model: ir.Model, groups: NodeGroups, chosen: Iterable[NodeGroup]) -> list[Reader]:
    """Return the initializers that read units of some groups.

    Raises:
        TrainingError: If a group has no such reader, or a reader's weights are codes.
    """
    wanted = {(member.parameter, member.axis): group for group in chosen for member in group.consumers}
    found: dict[tuple[str, int], Reader] = {}
    producers = {value.name: op for op in groups.graph.operators for value in op.outputs if value}
    for _, operands in groups.contractions():
        for reader in _readers(model, groups, operands, producers):
            if (reader.parameter, reader.axis) in wanted:
                found.setdefault((reader.parameter, reader.axis), reader)
    for group in chosen:
        if not any((member.parameter, member.axis) in found for member in group.consumers):
            raise TrainingError(
                f"nothing that reads the units of '{group.name}' can be observed",
                "leave this kind out, or score by magnitude",
            )
    return list(found.values())


def summed(
    model: ir.Model,
    readers: Iterable[Reader],
    batches: Iterable[Mapping[str, Any]],
    statistic: Callable[[Tensor], Any],
) -> dict[str, Any]:
    """Return the sum over batches of a statistic of each activation that is read, by its name.

    Args:
        model: The model.
        readers: What reads activations.
        batches: Inputs by name.
        statistic: From activations (tokens, indices) to something that can be added up.

    Raises:
        TrainingError: If there is no batch.
        InputsError: If an input is missing, or there is none of that name.
        VerificationError: If onnxruntime cannot run the model.
    """
    by_source = {reader.source: reader for reader in readers}
    session = OnnxSession(_with_outputs(model, by_source))
    sums: dict[str, Any] = {}
    for batch in batches:
        activations = session.run(as_arrays(batch, model), list(by_source))
        for reader, activation in zip(by_source.values(), activations, strict=True):
            part = statistic(reader.tokens(activation))
            sums[reader.source] = sums[reader.source] + part if reader.source in sums else part
    if not sums:
        raise TrainingError("there are no calibration inputs", "give at least one batch")
    return sums


def _with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """Return a copy of a model that returns further values."""
    observed = model.clone()
    values = {value.name: value for node in observed.graph for value in node.outputs}
    values |= {value.name: value for value in observed.graph.inputs}
    known = {value.name for value in observed.graph.outputs}
    observed.graph.outputs.extend(values[name] for name in names if name not in known)
    return observed


def _readers(
    model: ir.Model,
    groups: NodeGroups,
    operands: tuple[tuple[Value, Layout], ...],
    producers: Mapping[str, Operator],
) -> Iterator[Reader]:
    """Yield the weight that a product of an activation and a weight reads it with, if it is one."""
    activations = [pair for pair in operands if pair[0].name in groups.graph.dependence.on_inputs]
    weights = [_origin(pair[0], producers) for pair in operands if pair not in activations]
    if len(activations) != 1 or len(weights) != 1 or not weights[0].is_weight:
        return
    ((source, axis),), (weight,) = activations, weights
    dims = [dim for dim, layout in enumerate(groups.axes(source.name) or ()) if find(layout) is find(axis)]
    for position, layout in enumerate(groups.axes(weight.name) or ()):
        if dims and find(layout) is find(axis):
            yield Reader(weight.name, position, source.name, dims[-1], _floats(model, weight))


def _origin(value: Value, producers: Mapping[str, Operator]) -> Value:
    """Return the weight that a value is, turned or passed on at most."""
    while value.name in producers and producers[value.name].target in ("onnx.Transpose", "onnx.Identity"):
        value = producers[value.name].inputs[0]
    return value


def _floats(model: ir.Model, weight: Value) -> Tensor:
    """Return a weight's numbers in float32.

    Raises:
        TrainingError: If they are codes.
    """
    if not weight.dtype.startswith(("float", "bfloat")):
        raise TrainingError(
            f"the weight '{weight.name}' holds codes of type {weight.dtype}, which say nothing without their scales",
            "prune the model before it is quantized",
        )
    return torch.from_numpy(numbers_in(held_values(model)[weight.name]).astype(np.float32))


def _places(groups: NodeGroups, chosen: Iterable[NodeGroup], reader: Reader) -> tuple[Place, ...]:
    return tuple(
        Place(group.name, group.size, True, torch.from_numpy(group.owner(member)))
        for group in chosen
        for member in group.consumers
        if (member.parameter, member.axis) == (reader.parameter, reader.axis)
    )


def _magnitudes(model: ir.Model, groups: NodeGroups, chosen: Iterable[NodeGroup]) -> Scores:
    """Score as the saliency of that name does: the norm of a unit's weights, relative to the group's mean."""
    scores: Scores = {}
    for group in chosen:
        squares = torch.zeros(group.size)
        for member in group.members:
            if member.role == "parameter":
                weight = _floats(model, groups.graph.weights[member.parameter]).movedim(member.axis, -1)
                place = Place(group.name, group.size, True, torch.from_numpy(group.owner(member)))
                squares += place.by_unit(weight.square().reshape(-1, weight.shape[-1]).sum(0))
        scores[group.name] = squares.sqrt() / squares.sqrt().mean()
    return scores
