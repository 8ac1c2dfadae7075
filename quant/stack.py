"""LoftQ of a stack of matrices, such as the experts of a mixture: each by itself, stored as one packed tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.loftq import LoftQResult, loftq
from quant.quantized import QuantizedTensor
from quant.scales import Scales, Storage


def loftq_stack(
    weight: Tensor,
    format: str | int = "nf4",
    rank: int = 16,
    iterations: int = 5,
    block_size: int = 64,
    *,
    covariance: Tensor | None = None,
    scale_storage: Storage = "float32",
    seed: int = 0,
    name: str = "the weight",
) -> LoftQResult:
    """Run `quant.loftq` over a matrix, or over each matrix of a stack.

    Args:
        weight: Floating point (out_features, in_features) or (matrices, out_features, in_features).
        format: As in `quant.loftq`.
        rank: Rank of the adapters of each matrix.
        iterations: As in `quant.loftq`.
        block_size: As in `quant.loftq`; in a stack a matrix must be a whole number of blocks.
        covariance: (in_features, in_features) for all matrices or (matrices, in_features, in_features); None
            for LoftQ as published.
        scale_storage: As in `quant.loftq`; a stack cannot have "double".
        seed: As in `quant.loftq`.
        name: Of the weight, for messages.

    Returns:
        The packed weight in its shape, and for a stack the factors (matrices, rank, in_features) and (matrices,
        out_features, rank) and, as errors, the root mean square of the matrices'.

    Raises:
        QuantError: As in `quant.loftq`, or the matrices of a stack cannot be stored as one tensor.
    """
    if weight.dim() not in (2, 3):
        raise QuantError(
            f"{name} of shape {tuple(weight.shape)} is no matrix and no stack of them",
            "pass (out_features, in_features) or (matrices, out_features, in_features)",
        )
    matrices = weight if weight.dim() == 3 else weight[None]
    check_stackable(weight, block_size, scale_storage, name)
    results = [
        loftq(
            matrix,
            format,
            rank,
            iterations,
            block_size,
            covariance=covariance[index] if covariance is not None and covariance.dim() == 3 else covariance,
            scale_storage=scale_storage,
            seed=seed,
            name=name if weight.dim() == 2 else f"{name}[{index}]",
        )
        for index, matrix in enumerate(matrices)
    ]
    return results[0] if weight.dim() == 2 else _stacked(results)


def check_stackable(weight: Tensor, block_size: int, scale_storage: Storage, name: str) -> None:
    """Raise QuantError if this is a stack of matrices that cannot be stored as one packed tensor."""
    if weight.dim() != 3:
        return
    if scale_storage == "double":
        raise QuantError(
            f"{name} is a stack, whose scales cannot be quantized twice",
            'store them as "float32" or "float16"',
        )
    if weight[0].numel() % block_size:
        raise QuantError(
            f"a matrix of {name}, shape {tuple(weight.shape)}, is not a whole number of blocks of {block_size}",
            f"choose a block size that divides {weight[0].numel()}",
        )


def join_stack(matrices: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Return packed matrices as one packed stack of the very same values.

    Scales that are quantized twice become float32, since those of a stack cannot be.

    Args:
        matrices: Of one shape, format and block size; each a whole number of blocks.

    Raises:
        QuantError: They differ, or are no whole number of blocks.
    """
    first = matrices[0]
    kinds = {(each.shape, each.format, each.block_size) for each in matrices}
    if len(kinds) > 1 or math.prod(first.shape) % first.block_size:
        raise QuantError(
            f"matrices of {sorted(kinds)} cannot be stored as one stack",
            "pack all alike, with a block size that divides their number of weights",
        )
    parts = [_decoded(each).parts() for each in matrices]
    return QuantizedTensor.from_parts(
        {key: torch.cat([part[key] for part in parts]) for key in parts[0]},
        shape=(len(matrices), *first.shape),
        format=first.format,
        block_size=first.block_size,
    )


def _decoded(packed: QuantizedTensor) -> QuantizedTensor:
    if packed.scales.storage != "double":
        return packed
    offsets = None if packed.offsets is None else Scales(stored=packed.offsets.values())
    return replace(packed, scales=Scales(stored=packed.scales.values()), offsets=offsets)


def _stacked(results: Sequence[LoftQResult]) -> LoftQResult:
    """Lay the parts of all matrices end to end: that is what quantizing the whole stack would store."""
    quantized = join_stack([result.quantized for result in results])
    squares = zip(*[[error**2 for error in result.errors] for result in results], strict=True)
    return LoftQResult(
        quantized=quantized,
        lora_A=torch.stack([result.lora_A for result in results]),
        lora_B=torch.stack([result.lora_B for result in results]),
        errors=[math.sqrt(sum(square) / len(results)) for square in squares],
    )
