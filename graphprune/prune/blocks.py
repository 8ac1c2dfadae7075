"""Whole-block removal in one shot: the blocks that turn their input the least go (ShortGPT)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from graphprune.errors import BudgetError, TrainingError
from graphprune.saliency.blocks import block_influence
from graphprune.shrink.blocks import drop_blocks
from graphprune.trace.blocks import find_blocks
from graphprune.trace.inputs import keyword_inputs


@dataclass(frozen=True, slots=True, eq=False)
class DroppedBlocks:
    """A model without some of its blocks.

    Attributes:
        model: The smaller model.
        blocks: Numbers of the blocks that went, ascending.
        influence: (blocks,) of the original.
        removed_share: Of its parameters.
    """

    model: nn.Module
    blocks: tuple[int, ...]
    influence: Tensor
    removed_share: float


def drop_least_influential(
    model: nn.Module, batches: Sequence[Tensor | Mapping[str, Any]], remove: float
) -> DroppedBlocks:
    """Remove the blocks of least influence, as many as come nearest to a share of the parameters.

    Source: ShortGPT (arXiv 2403.03853).

    Args:
        model: A transformers model or another module; it is not changed.
        batches: Calibration text: token ids (batch, window), or keyword arguments of the forward.
        remove: The share of all parameters, 0 to 1.

    Raises:
        TraceError: If the model has no chain of blocks.
        BudgetError: If no number of blocks comes near the share, as `choose_blocks` says.
        ShrinkError: If the smaller model does not compute what it should.
        TrainingError: If there is no token, or a hidden state is not finite.
    """
    if not batches:
        raise TrainingError("the calibration set is empty", "give at least one batch")
    inputs = keyword_inputs(model, batches[0])
    chain = find_blocks(model, inputs)
    influence = block_influence(model, batches, chain)
    before = _count(model.parameters())
    blocks = choose_blocks(influence, chain.parameters(), before, remove)
    small = drop_blocks(model, blocks, inputs)
    return DroppedBlocks(small, blocks, influence, 1 - _count(small.parameters()) / before)


def choose_blocks(influence: Tensor, parameters: Sequence[int], total: int, remove: float) -> tuple[int, ...]:
    """Return which blocks to remove: those of least influence, as many as come nearest to the share asked for.

    Nearest from either side, the fewer blocks of two that are equally near; at least one goes and one stays.

    Args:
        influence: (blocks,).
        parameters: How many each block holds.
        total: How many the model has.
        remove: The share of `total` to remove, 0 to 1.

    Returns:
        Numbers of blocks, ascending.

    Raises:
        BudgetError: If the nearest is further off than half of the model's largest block, or there is one block only.
    """
    if len(parameters) < 2:
        raise BudgetError("a model of one block cannot lose it", "remove units of groups")
    order = influence.argsort(stable=True).tolist()
    shares = [gone / total for gone in accumulate(parameters[block] for block in order[:-1])]
    count = min(range(len(shares)), key=lambda place: abs(shares[place] - remove)) + 1
    if abs(shares[count - 1] - remove) > max(parameters) / total / 2 * (1 + 1e-9):
        raise BudgetError(
            f"{remove:.1%} of the parameters cannot be removed by whole blocks; "
            f"the nearest is {shares[count - 1]:.1%}",
            "ask for that, or remove units of groups",
        )
    return tuple(sorted(order[:count]))


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
