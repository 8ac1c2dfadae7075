"""The activations that gated consumers read: what of them goes, and statistics of them over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.saliency.consumers import Consumer
from graphprune.saliency.gates import Gates

Redundant = Callable[[str], Tensor]
"""From a group's name to a mask (units,) of its redundant units."""
Run = Callable[[Any], object]
HELD_OUT = 4
"""One window of so many, or batch where windows are not known, is held out."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Batches to gather statistics on.

    Attributes:
        fitted: What a repair is fitted to first.
        held: What it is judged on then.
        run: Runs the model on a batch; its result is not looked at.
    """

    fitted: Sequence[Any]
    held: Sequence[Any]
    run: Run

    @classmethod
    def of_windows(cls, windows: Tensor, batch_size: int, run: Run) -> Calibration:
        """Hold out every fourth window of token ids (windows, window), and run so many at a time."""
        held = torch.arange(len(windows)) % HELD_OUT == 1
        parts = (windows[~held], windows[held])
        fitted, judged = (part.split(batch_size) if len(part) else () for part in parts)
        return cls(fitted, judged, run)

    @classmethod
    def of_batches(cls, batches: Sequence[Any], run: Run) -> Calibration:
        """Hold out every fourth batch, of whatever the model takes."""
        fitted = [batch for number, batch in enumerate(batches) if number % HELD_OUT != 1]
        return cls(fitted, batches[1::HELD_OUT], run)

    @property
    def batches(self) -> list[Any]:
        """All of them."""
        return [*self.fitted, *self.held]


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
    batches: Iterable[Any],
    run: Run,
    statistic: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return the sum over batches of a statistic of each activation, with all gates open.

    Args:
        model: The gated model.
        gates: Its gates.
        batches: What the model is run on.
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
