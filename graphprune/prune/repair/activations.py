"""The activations that gated consumers read: what of them goes, and statistics of them over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from graphprune.saliency.consumers import Consumer
from graphprune.saliency.gates import Gates

Redundant = Callable[[str], Tensor]
"""From a group's name to a mask (units,) of its redundant units."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Text to gather statistics on.

    Attributes:
        windows: Token ids (windows, window).
        batch_size: How many of them are run together.
        run: Runs the model on a batch (batch, window); its result is not looked at.
    """

    windows: Tensor
    batch_size: int
    run: Callable[[Tensor], object]


def sources(gates: Gates) -> dict[str, Consumer]:
    """Return the activations that gated linear layers read, by name, each with one of those layers."""
    found: dict[str, Consumer] = {}
    for consumer in gates.consumers:
        if consumer.dim == -1:
            found.setdefault(consumer.source, consumer)
    return found


def gone_indices(consumer: Consumer, redundant: Redundant) -> Tensor:
    """Return a mask (indices,) of the indices that redundant units own of what a consumer reads."""
    gone = torch.zeros(len(next(iter(consumer.owners.values()))), dtype=torch.bool)
    for name, owner in consumer.owners.items():
        gone |= (owner >= 0) & redundant(name).cpu()[owner.clamp_min(0)]
    return gone


def summed(
    model: nn.Module,
    gates: Gates,
    batches: Iterable[Tensor],
    run: Callable[[Tensor], object],
    statistic: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return the sum over batches of a statistic of each activation, with all gates open.

    Args:
        model: The gated model.
        gates: Its gates.
        batches: Token ids (batch, window).
        run: Runs the model on a batch.
        statistic: From activations (tokens, indices), in float32, to a tensor of one shape for all batches.
    """
    sums: dict[str, Tensor] = {}

    def add(source: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sums[source] = sums.get(source, 0) + statistic(arguments[0].detach().flatten(0, -2).float())

    handles = [
        model.get_submodule(consumer.module).register_forward_pre_hook(partial(add, source), prepend=True)
        for source, consumer in sources(gates).items()
    ]
    try:
        with torch.no_grad(), gates.opened():
            for batch in batches:
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums
