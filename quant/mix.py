"""Mixed precision: which format each layer takes, by the paper's rule or from measured errors under a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, nn

from quant.affine import linearized
from quant.apply import compress_weight
from quant.calibration import Batch, as_batches, collect_covariances
from quant.codebooks import get_format
from quant.config import LoftQConfig
from quant.errors import QuantError
from quant.guidance import Importance, Loss, check_loss, token_importance
from quant.quantized import stored_nbytes
from quant.shared import SharedWeight, shared_weights

Formats = tuple[tuple[str, str | int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one layer costs and loses in one format.

    Attributes:
        format: Name of the format.
        nbytes: Codes, scales and adapters; biases stay as they are and are not counted.
        loss: Squared relative error after LoftQ, times what the layer counts.
    """

    format: str
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """The formats chosen, and what they were chosen by.

    Attributes:
        chosen: By layer; of layers that share a weight by the first.
        nbytes: Bytes of all layers in the formats chosen: what `loftq_model` reports of them, but for biases.
        loss: Sum of the losses chosen.
    """

    chosen: Mapping[str, Choice]
    nbytes: int
    loss: float

    @property
    def formats(self) -> Formats:
        """What `LoftQConfig.formats` takes."""
        return tuple((f"^{re.escape(name)}$", choice.format) for name, choice in self.chosen.items())


def paper_mix(layers: Sequence[str], bits: float, high: str | int = "nf4", low: str | int = "nf2") -> Formats:
    """Return LoftQ's mix of 4 and 2 bits: the first layers take the high format, the others the low one.

    Args:
        layers: Regular expressions of the model's blocks, in order, such as "layers[.]0[.]".
        bits: Average wanted, between the bits of the two formats.
        high: Format of the first ``layers * (bits - low) / (high - low)`` blocks.
        low: Format of the others.

    Raises:
        QuantError: The average is not between the two, or a single string is given for the blocks.

    Source: LoftQ (arXiv 2310.08659), table 5.
    """
    if isinstance(layers, str):
        raise QuantError(
            f"layers is the single expression {layers!r}, not one for each block",
            'pass them all in order, such as [rf"layers[.]{i}[.]" for i in range(32)]',
        )
    most, least = get_format(high).bits, get_format(low).bits
    if not least <= bits <= most or most == least:
        raise QuantError(
            f"an average of {bits} bits is not between {low} and {high}", f"choose from {least} to {most}"
        )
    count = int(len(layers) * (bits - least) / (most - least))
    return tuple((layer, high if index < count else low) for index, layer in enumerate(layers))


def mix_for_budget(
    model: nn.Module,
    config: LoftQConfig,
    nbytes: int,
    formats: Sequence[str | int] | str | int = ("uint2", "uint3", "nf4"),
    batches: Iterable[Batch] | None = None,
    *,
    loss: Loss | None = None,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> Mix:
    """Choose a format for each linear layer so that all fit into a number of bytes and lose the least.

    Layers are those that `loftq_model` would pack: ones that share a weight take one format, and are counted once;
    ones that share an embedding's take the `embedding_format`, or are left out without one. Every other
    layer is put through LoftQ in every format, and its squared relative error measured, that of its
    outputs where there are calibration batches. It counts by the layer's share of the weights; with a loss, by
    how much the error would raise it, to second order. The layers then take, one step at a time, the wider format that
    saves the most error for its bytes: the best choice for the bytes it ends with, up to one layer.

    Args:
        model: Left as it is.
        config: Rank, iterations, block size and which layers; its formats are ignored.
        nbytes: Budget for codes, scales and adapters of these layers, embeddings that are packed among them.
        formats: What a layer may take.
        batches: Calibration text as in `loftq_model`.
        loss: As in `loftq_model`.
        on_layer: Called after each layer with its name, how many are done, and how many there are.

    Raises:
        QuantError: No layer matches, or even the smallest formats do not fit.
    """
    if not nbytes >= 0:
        raise QuantError(f"a budget of {nbytes} bytes", "pass a number of bytes")

    def budget(_: list[SharedWeight], least: int) -> int:
        if least > nbytes:
            raise _too_small(f"{least} bytes", f"{nbytes}", config, "lower the rank")
        return nbytes

    return _mix(model, config, formats, batches, loss, on_layer, budget)


def mix_for_bits(
    model: nn.Module,
    config: LoftQConfig,
    bits: float,
    formats: Sequence[str | int] | str | int = ("uint2", "uint3", "nf4"),
    batches: Iterable[Batch] | None = None,
    *,
    loss: Loss | None = None,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> Mix:
    """Choose formats as `mix_for_budget` does, for so many bits a weight of the linear layers: codes and scales.

    Neither adapters nor what the `embedding_format` packs are counted.

    Raises:
        QuantError: No layer matches, or even the smallest formats take more.
    """
    if not bits > 0:
        raise QuantError(f"a budget of {bits} bits a weight", "pass a number above 0")

    def budget(groups: list[SharedWeight], least: int) -> int:
        weights = sum(group.weight.numel() for group in groups if not group.embeds)
        adapters = sum(_adapter_nbytes(group, config) for group in groups)
        embeddings = sum(_embedding_nbytes(group, config) for group in groups if group.embeds)
        uncounted = adapters + embeddings
        nbytes = int(bits * weights / 8) + uncounted
        if least > nbytes:
            told = f"{8 * (least - uncounted) / weights:.5g} bits a weight with their scales"
            raise _too_small(told, f"{bits:g}", config, "take larger blocks")
        return nbytes

    return _mix(model, config, formats, batches, loss, on_layer, budget)


def _mix(
    model: nn.Module,
    config: LoftQConfig,
    formats: Sequence[str | int] | str | int,
    batches: Iterable[Batch] | None,
    loss: Loss | None,
    on_layer: Callable[[str, int, int], None] | None,
    budget: Callable[[list[SharedWeight], int], int],
) -> Mix:
    """Measure each weight that `loftq_model` would pack in each format, and choose.

    What the weights may take, the `budget` says before anything is measured; it is given them and the least bytes
    that they take.
    """
    check_loss(loss, batches)
    formats = _checked(formats)
    text = None if batches is None else as_batches(batches)
    measured = {}
    with linearized(model, config.includes):
        groups = shared_weights(model, config)
        nbytes = budget(groups, sum(_least_nbytes(group, config, formats) for group in groups))
        names = [group.name for group in groups if not group.embeds]
        importance = None if text is None or loss is None else token_importance(model, text, names, loss)
        calls = {name: found.calls for name, found in (importance or {}).items()}
        covariances = {} if text is None else collect_covariances(model, text, names, calls)
        total = sum(group.weight.numel() for group in groups)
        for done, group in enumerate(groups, start=1):
            name, covariance = group.name, covariances.get(group.name)
            if importance is None:
                counts = group.weight.numel() / total
            else:
                counts = _loss_of_all(group.weight.detach(), covariance, importance.get(name))
            measured[name] = _choices(group, counts, config, formats, covariance)
            if on_layer is not None:
                on_layer(name, done, len(groups))
    return _choose(measured, nbytes)


def _checked(formats: Sequence[str | int] | str | int) -> Sequence[str | int]:
    several = [formats] if isinstance(formats, (str, int)) else formats
    if not several:
        raise QuantError("there is no format to choose from", "give at least one in `formats`")
    return several


def _least_nbytes(group: SharedWeight, config: LoftQConfig, formats: Sequence[str | int]) -> int:
    """Return the bytes of a weight and its adapters in the smallest format that it may take."""
    if group.embeds:
        return _embedding_nbytes(group, config)
    sizes = [
        stored_nbytes(group.weight.numel(), format, config.block_size, config.scale_storage)
        for format in formats
    ]
    return min(sizes) + _adapter_nbytes(group, config)


def _embedding_nbytes(group: SharedWeight, config: LoftQConfig) -> int:
    # Without a format of their own, embeddings are not among what is packed.
    format = config.embedding_format or config.format
    return stored_nbytes(group.weight.numel(), format, config.embedding_block_size)


def _adapter_nbytes(group: SharedWeight, config: LoftQConfig) -> int:
    return 0 if group.embeds else 4 * config.rank * sum(group.weight.shape)


def _loss_of_all(weight: Tensor, covariance: Tensor | None, importance: Importance | None) -> float:
    """Return how much the loss would rise, to second order and up to a factor, if the layer put out nothing."""
    if covariance is None or importance is None:
        return 0.0
    rows = sum(len(call) for call in importance.calls)
    return importance.scale * rows * float(((weight @ covariance) * weight).sum())


def _choices(
    group: SharedWeight,
    counts: float,
    config: LoftQConfig,
    formats: Sequence[str | int],
    covariance: Tensor | None,
) -> list[Choice]:
    """Return the choices of one weight that are worth having; an embedding has one, the configuration's."""
    tried = formats[:1] if group.embeds else formats
    return _worth_having(
        _measure(group, counts, replace(config, format=format, formats=()), covariance) for format in tried
    )


def _measure(group: SharedWeight, counts: float, config: LoftQConfig, covariance: Tensor | None) -> Choice:
    quantized, *factors, errors = compress_weight(group, config, group.weight.detach(), covariance)
    nbytes = quantized.nbytes + sum(factor.nbytes for factor in factors if factor is not None)
    return Choice(format=quantized.format, nbytes=nbytes, loss=counts * min(errors) ** 2)


def _worth_having(choices: Iterable[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull of loss over bytes, the smallest first."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _saving(small: Choice, large: Choice) -> float:
    """Return the loss saved for each byte more."""
    return (small.loss - large.loss) / (large.nbytes - small.nbytes)


def _smallest(measured: Mapping[str, list[Choice]]) -> int:
    return sum(choices[0].nbytes for choices in measured.values())


def _too_small(least: str, budget: str, config: LoftQConfig, remedy: str) -> QuantError:
    stored = "" if config.scale_storage == "double" else 'set scale_storage="double", '
    return QuantError(
        f"the smallest formats take {least}, the budget is {budget}",
        f"raise the budget, {stored}{remedy}, or allow a smaller format",
    )


def _choose(measured: Mapping[str, list[Choice]], nbytes: int) -> Mix:
    """Return the mix for a number of bytes that the smallest formats do not exceed."""
    chosen, used = {name: choices[0] for name, choices in measured.items()}, _smallest(measured)
    steps = [
        (_saving(small, large), name, large)
        for name, choices in measured.items()
        for small, large in pairwise(choices)
    ]
    for _, name, large in sorted(steps, key=lambda step: -step[0]):
        more = large.nbytes - chosen[name].nbytes
        # On a hull a layer's own steps come in order; one that does not fit ends that layer's climb.
        if used + more <= nbytes and _is_next(measured[name], chosen[name], large):
            chosen[name], used = large, used + more
    return Mix(chosen=chosen, nbytes=used, loss=sum(choice.loss for choice in chosen.values()))


def _is_next(choices: list[Choice], now: Choice, then: Choice) -> bool:
    return choices.index(then) == choices.index(now) + 1
