"""Block influence: how far a block turns its input (ShortGPT)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.errors import TrainingError
from graphprune.trace.blocks import BlockChain, find_blocks, run, watching
from graphprune.trace.inputs import keyword_inputs


def block_influence(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], chain: BlockChain | None = None
) -> Tensor:
    """Return one minus the mean cosine between a block's input and its output, over all tokens.

    Source: ShortGPT (arXiv 2403.03853), equation 1.

    Args:
        model: Run in evaluation mode without gradients.
        batches: Token ids (batch, window), or keyword arguments; tokens that an ``attention_mask`` hides do not count.
        chain: Its blocks; by default those that the first batch finds.

    Returns:
        (blocks,) in float64 on the CPU, each 0 (a block that changes no direction) to 2.

    Raises:
        TraceError: If the model has no chain of blocks.
        TrainingError: If there is no token, or a hidden state is not finite.
    """
    sums: Tensor | None = None
    count = 0
    for batch in batches:
        inputs = keyword_inputs(model, batch)
        chain = chain or find_blocks(model, inputs)
        found, tokens = _batch_sums(model, inputs, chain)
        sums, count = found if sums is None else sums + found, count + tokens
    if sums is None or chain is None or not count:
        raise TrainingError("the calibration set is empty", "give at least one token")
    if not bool(sums.isfinite().all()):
        block = int((~sums.isfinite()).nonzero()[0])
        raise TrainingError(
            f"what goes into or comes out of block {block} of '{chain.name}' is not finite",
            "run the model in float32, or on other calibration windows",
        )
    return (1 - sums / count).clamp(0, 2)


def _batch_sums(model: nn.Module, inputs: Mapping[str, Any], chain: BlockChain) -> tuple[Tensor, int]:
    """Return the sum of cosines over a batch's tokens for each block, and how many tokens those are."""
    mask = inputs.get("attention_mask")
    sums = torch.zeros(len(chain.blocks), dtype=torch.float64)
    tokens = 0

    def see(number: int, hidden: Tensor, output: Tensor) -> None:
        nonlocal tokens
        cosines = functional.cosine_similarity(hidden.double(), output.double(), dim=-1)
        if isinstance(mask, Tensor) and mask.shape == cosines.shape:
            cosines = cosines[mask.to(cosines.device) > 0]
        sums[number] += cosines.sum().cpu()
        tokens = cosines.numel()

    with watching(chain, see):
        run(model, inputs)
    return sums, tokens
