"""Quantizing a chain of blocks in order, each layer for the inputs that the quantized layers before it give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from quant.calibration import InputSum, watched
from quant.chain import BlockCall, Chain, run_block
from quant.covariance import propagated_target
from quant.errors import QuantError

MOST_STAGES = 8
"""Blocks with more stages, such as those of many experts, are measured in one run instead of one a stage."""

Compress = Callable[[str, Tensor, Tensor | None], None]
"""Called with a layer's name, the weight to come near to, and the covariance of its inputs or None without any."""

Finish = Callable[[str, nn.Module, Sequence[BlockCall], list[Tensor], list[Tensor]], list[Tensor]]
"""Called with the name of a compressed block, it, its calls, what these give it, and what the dense block puts out;
returns what the compressed one puts out."""


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
    importance: Mapping[str, Sequence[Tensor]] | None = None,
    finish: Finish | None = None,
) -> None:
    """Measure and compress the layers of a chain, in place, in the order in which they run.

    Layers with the same input are one stage, measured when all before it are compressed. Of what those shifted
    the stage's inputs by, a share is taken back by its own weights.

    Args:
        chain: Dense blocks.
        layers: The layers to compress, by qualified name; those outside the chain are ignored.
        propagation: The share: 0 keeps each weight as its target, 1 trusts the calibration text fully.
        compress: Called once for each layer in the chain; it puts a compressed layer in its place.
        importance: What the inputs of each call of a layer count; those of layers that are not in it count 1.
        finish: Called once for each block, when its layers are compressed.
    """
    weighted = importance or {}
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
            sums = _run_quantized(block, live, group, quantized, chain.calls[index], weighted)
            for stage in group:
                for name in stage.layers:
                    measured = sums.get(name, sums[stage.first])
                    _compress_layer(name, stage.layers[name], measured, propagation, compress)
        for name in inside.keys() - {name for stage in stages for name in stage.layers}:
            compress(name, inside[name].weight, None)
        if finish is not None:
            quantized = finish(prefix[:-1], block, chain.calls[index], quantized, dense)
        else:
            quantized = run_block(block, chain.calls[index], quantized)


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
        outputs = run_block(block, calls, hidden)
    return stages, outputs


def _run_quantized(
    block: nn.Module,
    live: Mapping[str, nn.Module],
    stages: list[_Stage],
    hidden: list[Tensor],
    calls: list[BlockCall],
    importance: Mapping[str, Sequence[Tensor]],
) -> dict[str, _Measured]:
    """Return what each stage gets, under its first layer's name, and under those of others with an importance."""
    sums: dict[str, _Measured] = {}
    # What a block computes behind the only layer that is watched, and that runs once, is not needed.
    suffices = len(stages) == 1 and len(stages[0].dense_inputs) == len(calls)

    def watch(stage: _Stage) -> Callable[[Tensor], None]:
        names = [name for name in stage.layers if name == stage.first or name in importance]
        sums.update({name: _Measured() for name in names})
        dense_calls = iter(stage.dense_inputs)
        counts = {name: iter(importance.get(name, ())) for name in names}

        def saw(inputs: Tensor) -> None:
            dense = next(dense_calls, None)
            for name in names:
                sums[name].add(inputs, dense, next(counts[name], None))
            if suffices:
                raise _Seen

        return saw

    with ExitStack() as hooks:
        for stage in stages:
            hooks.enter_context(watched(live[stage.first], watch(stage)))
        for each, state in zip(calls, hidden, strict=True):
            with suppress(_Seen):
                each.run(block, state)
    return sums


class _Seen(Exception):  # noqa: N818 -- no error: it ends a run
    """All that a run of a block was for has been seen."""


class _Measured:
    """The second moment of what a layer gets, and that with what it got in the dense model."""

    def __init__(self) -> None:
        self.own, self.cross = InputSum(), InputSum()

    def add(self, inputs: Tensor, dense: Tensor | None, importance: Tensor | None) -> None:
        self.own.add(inputs, importance=importance)
        # Under routing the quantized model may send an expert other tokens than the dense one did.
        if dense is not None and dense.shape == inputs.shape:
            self.cross.add(inputs, dense, importance)


def _compress_layer(
    name: str, layer: nn.Linear, measured: _Measured, propagation: float, compress: Compress
) -> None:
    own, cross, target = measured.own, measured.cross, layer.weight.detach()
    covariance = own.mean() if own.rows else None
    if covariance is not None and cross.rows == own.rows and propagation > 0:
        target = propagated_target(target, covariance, cross.mean(), propagation)
    compress(name, target, covariance)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise QuantError(f"{name} is a {type(layer).__name__}, not nn.Linear", "compress each layer once")
    return layer
