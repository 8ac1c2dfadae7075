"""Block-wise quantization: each run of consecutive weights shares a scale, and in affine formats an offset."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quant.codebooks import Format, get_format
from quant.errors import QuantError
from quant.fit import covering_scales, fitted_scales
from quant.packing import pack
from quant.quantized import QuantizedTensor, check_block_size
from quant.scales import Scales, Storage, check_storage, store_scales

# Weights that are rounded at a time: what lies between a weight and its code then stays in the cache.
CHUNK = 1 << 17


def quantize(
    weight: Tensor,
    format: str | int = "nf4",
    block_size: int = 64,
    *,
    fitted: bool | None = None,
    scale_storage: Storage = "float32",
    name: str = "the weight",
) -> QuantizedTensor:
    """Quantize a tensor: scale each block into [-1, 1], then take the nearest level of each weight.

    Args:
        weight: Floating point, any shape and dtype, computed in float32; finite and not empty.
        format: A name of `quant.format_names()`, or a number of bits for the best format of that many.
        block_size: Consecutive elements, row-major, that share a scale: a power of two from 16 to 4096.
        fitted: Whether scales are those of least squared error, or the least that cover the block; None for
            what the format does by default.
        scale_storage: How scales and offsets are stored: "float32", "float16" or "double" (quantized too).
        name: Of the weight, for messages.

    Returns:
        The packed tensor, on the weight's device. A block of zeros has the scale 0.

    Raises:
        QuantError: Unknown format, wrong block size, or a weight that is empty, on the meta device, of
            integers, or not finite.

    Source: Dettmers et al., 8-bit Optimizers (arXiv 2110.02861) section 2.1; LoftQ (arXiv 2310.08659).
    """
    codebook = get_format(format)
    check_block_size(block_size)
    check_storage(scale_storage)
    _check_kind(weight, name)
    flat = weight.detach().reshape(-1).to(torch.float32)
    _check_finite(flat, name, tuple(weight.shape))
    scales, offsets = block_scales(flat, codebook, block_size, fitted)
    stored = store_scales(scales, scale_storage)
    stored_offsets = None if offsets is None else store_scales(offsets, scale_storage)
    codes = round_to_levels(flat, codebook, stored, stored_offsets, block_size)
    return QuantizedTensor(
        codes=pack(codes, codebook.bits),
        scales=stored,
        offsets=stored_offsets,
        shape=tuple(weight.shape),
        format=codebook.name,
        block_size=block_size,
    )


def block_scales(
    flat: Tensor,
    format: Format,
    block_size: int,
    fitted: bool | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the scales, and for an affine format the offsets, of consecutive weights.

    Args:
        flat: float32 (weights,).
        format: Of the codes.
        block_size: Weights that share a scale; the last block may be shorter.
        fitted: As in `quantize`.
        importance: float32 (weights,), what each squared error counts in a fit; None for all alike.
    """
    whole = len(flat) // block_size * block_size
    found = []
    for start, stop, size in ((0, whole, block_size), (whole, len(flat), len(flat) - whole)):
        if start == stop:
            continue
        blocks = flat[start:stop].view(-1, size)
        if format.fitted if fitted is None else fitted:
            weights = None if importance is None else importance[start:stop].view(-1, size)
            found.append(fitted_scales(blocks, format, weights))
        else:
            found.append(covering_scales(blocks, format))
    offsets = [offset for _, offset in found if offset is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(offsets) if offsets else None


def round_to_levels(
    flat: Tensor, format: Format, scales: Scales, offsets: Scales | None, block_size: int
) -> Tensor:
    """Return the code of the level nearest to each weight: uint8 (weights,)."""
    scale, shift = scales.values(), None if offsets is None else offsets.values()
    divisor = torch.where(scale != 0, scale, torch.ones_like(scale))
    codes = torch.empty(len(flat), dtype=torch.uint8, device=flat.device)
    step = max(1, CHUNK // block_size)
    for first in range(0, len(scale), step):
        blocks = slice(first, first + step)
        part = slice(first * block_size, (first + step) * block_size)
        scaled = _scaled(flat[part], block_size, divisor[blocks], None if shift is None else shift[blocks])
        codes[part] = format.nearest(scaled).view(-1)[: len(codes[part])]
    return codes


def _scaled(flat: Tensor, block_size: int, divisor: Tensor, offset: Tensor | None) -> Tensor:
    """Return weights in units of their block's scale: (blocks, block_size), the last block filled up."""
    blocks = functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    centred = blocks if offset is None else blocks - offset[:, None]
    return (centred / divisor[:, None]).clamp_(-1, 1)


def check_weight(weight: Tensor, name: str = "the weight") -> None:
    """Raise QuantError unless `quantize` can take this weight: real, floating point, finite, not empty."""
    _check_kind(weight, name)
    _check_finite(weight.detach().to(torch.float32), name, tuple(weight.shape))


def _check_kind(weight: Tensor, name: str) -> None:
    if not isinstance(weight, Tensor):
        raise QuantError(f"{name} is a {type(weight).__name__}", "pass a torch.Tensor")
    shape = tuple(weight.shape)
    if not weight.is_floating_point():
        raise QuantError(
            f"{name} of dtype {weight.dtype} cannot be quantized", "pass a floating-point weight"
        )
    if weight.is_meta:
        raise QuantError(f"{name} of shape {shape} is on the meta device and has no data", "load it first")
    if weight.numel() == 0:
        raise QuantError(f"{name} of shape {shape} is empty", "leave this layer out")


def _check_finite(flat: Tensor, name: str, shape: tuple[int, ...]) -> None:
    low, high = flat.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise QuantError(
            f"{name} of shape {shape} holds nan or infinity, or exceeds float32",
            "repair the weight before quantizing it",
        )
