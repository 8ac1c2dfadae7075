"""Quantizing a chain of blocks in order, each layer for the inputs that the quantized layers before it give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from quant.calibration import InputSum, watched
from quant.chain import BlockCall, Chain
from quant.covariance import propagated_target
from quant.errors import QuantError

MOST_STAGES = 8
"""Blocks with more stages, such as those of many experts, are measured in one run instead of one a stage."""

Compress = Callable[[str, Tensor, Tensor | None], None]
"""Called with a layer's name, the weight to come near to, and the covariance of its inputs or None without any."""


@dataclass(slots=True, eq=False)
class _Stage:
    """Layers that get the very same input, the first of them, and what it gets in the dense model, call by call."""

    layers: dict[str, nn.Linear]
    dense_inputs: list[Tensor] = field(default_factory=list)

    @property
    def first(self) -> str:
        return next(iter(self.layers))


def quantize_chain(
    chain: Chain,
    layers: Mapping[str, nn.Linear],
    propagation: float,
    compress: Compress,
) -> None:
    """Measure and compress the layers of a chain, in place, in the order in which they run.

    Layers with the same input are one stage, measured when all before it are compressed. Of what those shifted
    the stage's inputs by, a share is taken back by its own weights.

    Args:
        chain: Dense blocks.
        layers: The layers to compress, by qualified name; those outside the chain are ignored.
        propagation: The share: 0 keeps each weight as its target, 1 trusts the calibration text fully.
        compress: Called once for each layer in the chain; it puts a compressed layer in its place.
    """
    dense, quantized = list(chain.hidden), list(chain.hidden)
    for index, block in enumerate(chain.blocks):
        prefix = f"{chain.name}.{index}."
        reference = copy.deepcopy(block)
        inside = {
            name: _linear(reference, name.removeprefix(prefix)) for name in layers if name.startswith(prefix)
        }
        stages, dense = _run_dense(reference, inside, dense, chain.calls[index])
        together = [stages] if len(stages) > MOST_STAGES else [[stage] for stage in stages]
        for group in together:
            live = {stage.first: _linear(block, stage.first.removeprefix(prefix)) for stage in group}
            sums = _run_quantized(block, live, group, quantized, chain.calls[index])
            for stage in group:
                _compress_stage(stage, *sums[stage.first], propagation, compress)
        for name in inside.keys() - {name for stage in stages for name in stage.layers}:
            compress(name, inside[name].weight, None)
        quantized = [
            each.run(block, hidden) for each, hidden in zip(chain.calls[index], quantized, strict=True)
        ]


def _run_dense(
    block: nn.Module, layers: Mapping[str, nn.Linear], hidden: list[Tensor], calls: list[BlockCall]
) -> tuple[list[_Stage], list[Tensor]]:
    """Return the stages of a dense block, in the order in which they run, and what it puts out."""
    stages: list[_Stage] = []
    latest: list[Tensor] = []

    def saw(name: str, inputs: Tensor) -> None:
        known = next((stage for stage in stages if name in stage.layers), None)
        if known is None and latest and latest[0] is inputs:
            stages[-1].layers[name] = layers[name]
        elif known is None:
            stages.append(_Stage({name: layers[name]}, [inputs]))
        elif known.first == name:
            known.dense_inputs.append(inputs)
        latest[:] = [inputs]

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(watched(layer, partial(saw, name)))
        outputs = [each.run(block, state) for each, state in zip(calls, hidden, strict=True)]
    return stages, outputs


def _run_quantized(
    block: nn.Module,
    live: Mapping[str, nn.Module],
    stages: list[_Stage],
    hidden: list[Tensor],
    calls: list[BlockCall],
) -> dict[str, tuple[InputSum, InputSum]]:
    """Return what the first layer of each stage gets: its second moment, and that with its dense inputs."""
    sums = {stage.first: (InputSum(), InputSum()) for stage in stages}
    left = {stage.first: iter(stage.dense_inputs) for stage in stages}

    def saw(name: str, inputs: Tensor) -> None:
        own, cross = sums[name]
        own.add(inputs)
        dense = next(left[name], None)
        # Under routing the quantized model may send an expert other tokens than the dense one did.
        if dense is not None and dense.shape == inputs.shape:
            cross.add(inputs, dense)

    with ExitStack() as hooks:
        for name, layer in live.items():
            hooks.enter_context(watched(layer, partial(saw, name)))
        for each, state in zip(calls, hidden, strict=True):
            each.run(block, state)
    return sums


def _compress_stage(
    stage: _Stage, own: InputSum, cross: InputSum, propagation: float, compress: Compress
) -> None:
    covariance = own.mean() if own.rows else None
    paired = covariance is not None and cross.rows == own.rows and propagation > 0
    for name, layer in stage.layers.items():
        target = layer.weight.detach()
        if covariance is not None and paired:
            target = propagated_target(target, covariance, cross.mean(), propagation)
        compress(name, target, covariance)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise QuantError(f"{name} is a {type(layer).__name__}, not nn.Linear", "compress each layer once")
    return layer
