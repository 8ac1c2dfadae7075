"""Statistics of what the consumers of gated units read, gathered in one pass; no activation is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.saliency.consumers import Consumer
from graphprune.saliency.effective import EffectiveWeight, effective_weights
from graphprune.saliency.gradient import losses
from graphprune.saliency.registry import Evidence
from graphprune.saliency.units import Place


@dataclass(frozen=True, slots=True)
class InputMoments:
    """Sums over tokens of an activation, for each of its indices (indices,), in float64.

    Attributes:
        count: Number of tokens.
        sums: Of the activation.
        squares: Of its square.
    """

    count: int
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> InputMoments:
        """Return the moments of activations (tokens, indices)."""
        exact = tokens.detach().double()
        return cls(len(exact), exact.sum(0), exact.square().sum(0))

    def __add__(self, other: InputMoments) -> InputMoments:
        """Return the moments of both sets of tokens together."""
        return InputMoments(self.count + other.count, self.sums + other.sums, self.squares + other.squares)

    @property
    def norm(self) -> Tensor:
        """The L2 norm over tokens."""
        return self.squares.sqrt()

    @property
    def variance(self) -> Tensor:
        """The variance over tokens."""
        return (self.squares / self.count - (self.sums / self.count).square()).clamp_min(0)


class Consumed(Protocol):
    """A weight that reads units, wherever it is held."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Where groups have units along its input."""

    @property
    def moments(self) -> InputMoments:
        """Of what it reads."""

    def column_sums(self, elements: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sums (indices,) of a function of the weight over what each index is multiplied by."""


@dataclass(frozen=True, slots=True)
class ConsumedWeight:
    """A weight in effect that reads gated units; its low-rank factors are no consumers of their own.

    Attributes:
        weight: The weight.
        places: Where gated groups have units along its input.
        moments: Of what it reads.
    """

    weight: EffectiveWeight
    places: tuple[Place, ...]
    moments: InputMoments

    def column_sums(self, elements: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sums (indices,) of a function of the weight over what each index is multiplied by."""
        return sum((elements(chunk.effective).sum(0) for chunk in self.weight.chunks()), torch.zeros(()))


@dataclass(frozen=True, slots=True)
class Reader:
    """A weight in effect that reads gated units, and where; its low-rank factors are no readers of their own.

    Attributes:
        consumer: The weight as gates see it.
        weight: Its numbers.
        places: Where gated groups have units along its input.
    """

    consumer: Consumer
    weight: EffectiveWeight
    places: tuple[Place, ...]


def readers(evidence: Evidence) -> list[Reader]:
    """Return all weights that read gated units."""
    adapted = effective_weights(evidence.model, evidence.groups)
    factors = {term.down for weight in adapted.values() for term in weight.terms}
    return [
        Reader(
            consumer,
            adapted.get(consumer.parameter) or _plain(evidence, consumer),
            tuple(
                Place(name, evidence.gates.groups[name].size, True, owner)
                for name, owner in consumer.owners.items()
            ),
        )
        for consumer in evidence.gates.consumers
        if consumer.parameter not in factors
    ]


def consumed_weights(evidence: Evidence) -> list[ConsumedWeight]:
    """Run the calibration batches once, and return all weights that read gated units.

    Raises:
        TrainingError: If the input of one cannot be observed, there is no batch, or the loss is not finite.
    """
    found = readers(evidence)
    moments = _observed(evidence, [reader.consumer for reader in found])
    return [ConsumedWeight(reader.weight, reader.places, moments[reader.consumer.source]) for reader in found]


def _plain(evidence: Evidence, consumer: Consumer) -> EffectiveWeight:
    shape = evidence.groups.graph.weights[consumer.parameter].shape
    return EffectiveWeight(evidence.model, consumer.parameter, consumer.axis, shape)


def _observed(evidence: Evidence, consumers: Iterable[Consumer]) -> dict[str, InputMoments]:
    """Return the moments of every activation that consumers read, by its name."""
    by_source: dict[str, tuple[Consumer, int]] = {}
    for consumer in consumers:
        by_source.setdefault(consumer.source, (consumer, observable_dim(consumer)))
    moments: dict[str, InputMoments] = {}

    def observe(consumer: Consumer, dim: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        found = InputMoments.of(arguments[0].movedim(dim, -1).flatten(0, -2))
        known = moments.get(consumer.source)
        moments[consumer.source] = found if known is None else known + found

    with _observing(evidence.model, by_source.values(), observe), torch.no_grad():
        for _ in losses(evidence):
            pass
    for source, (consumer, _) in by_source.items():
        if source not in moments:
            raise not_called(consumer)
    return moments


def observable_dim(consumer: Consumer) -> int:
    """Return which dimension of its module's input a weight contracts.

    Raises:
        TrainingError: If its module works out within what the weight reads.
    """
    if consumer.dim is None:
        raise TrainingError(
            f"what {consumer.parameter} reads cannot be observed: '{consumer.module}' works it out within",
            "score by gradients, such as fisher, or leave this kind out (recipe: prune.saliency, prune.kinds)",
        )
    return consumer.dim


def not_called(consumer: Consumer) -> TrainingError:
    """Return the error for a weight whose module a forward passes by."""
    return TrainingError(
        f"what {consumer.parameter} reads cannot be observed: '{consumer.module}' is not called",
        "leave this kind out of kinds (recipe: prune.kinds)",
    )


@contextmanager
def _observing(
    model: nn.Module, consumers: Iterable[tuple[Consumer, int]], observe: Callable[..., None]
) -> Iterator[None]:
    handles = [
        model.get_submodule(consumer.module).register_forward_pre_hook(partial(observe, consumer, dim))
        for consumer, dim in consumers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
