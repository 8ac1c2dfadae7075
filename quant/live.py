"""A packed linear layer whose codes, scales and offsets can be trained, and that packs again."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.codebooks import Format, get_format
from quant.linear import QuantLinear
from quant.packing import pack
from quant.scales import store_scales


class LiveLinear(nn.Module):
    """``y = x R(V)^T + scaling (x A^T) B^T + bias``: R takes the level nearest to V, times scale, plus offset.

    V starts on the levels of the layer's codes, so that only a gradient that persists moves a code: started nearer to
    the dense weight, those by the edges of their cells would change for nothing, and undo compensated rounding.

    Args:
        layer: Its adapters and bias are used as they are, not copied.

    Attributes:
        latent: V, in units of the scale: float32 (blocks, block_size); what is behind the last weight means nothing.
        scale: float32 (blocks, 1).
        offset: float32 (blocks, 1) in affine formats, else None.
    """

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        packed = layer.quantized
        self.layer = layer
        self.format = get_format(packed.format)
        codes = packed.unpacked_codes().view(-1).int()
        levels = self.format.levels.to(codes.device)[
            functional.pad(codes, (0, -len(codes) % packed.block_size))
        ]
        self.latent = nn.Parameter(levels.view(-1, packed.block_size))
        self.scale = nn.Parameter(packed.scales.values()[:, None].clone())
        self.offset = (
            None if packed.offsets is None else nn.Parameter(packed.offsets.values()[:, None].clone())
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer will, once packed with scales in float32."""
        layer = self.layer
        blocks: Tensor = _Nearest.apply(self.latent, self.format) * self.scale
        if self.offset is not None:
            blocks = blocks + self.offset
        weight = blocks.view(-1)[: math.prod(layer.shape)].view(layer.shape)
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        output = functional.linear(input, weight.to(input.dtype), bias)
        if layer.lora_A is None or layer.lora_B is None:
            return output
        hidden = functional.linear(input, layer.lora_A.to(input.dtype))
        return torch.add(output, functional.linear(hidden, layer.lora_B.to(input.dtype)), alpha=layer.scaling)

    def packed(self) -> QuantLinear:
        """Return the layer with the codes and scales of now, stored as before."""
        layer, before = self.layer, self.layer.quantized
        offsets = (
            None
            if self.offset is None or before.offsets is None
            else store_scales(self.offset.detach().view(-1), before.offsets.storage)
        )
        codes = _codes(self.latent.detach(), self.format).view(-1)[: math.prod(layer.shape)]
        quantized = replace(
            before,
            codes=pack(codes, self.format.bits),
            scales=store_scales(self.scale.detach().view(-1), before.scales.storage),
            offsets=offsets,
        )
        return QuantLinear(
            quantized,
            layer.bias,
            layer.lora_A,
            layer.lora_B,
            layer.scaling,
            layer.dtype,
            transposed=layer.transposed,
        )


class _Nearest(torch.autograd.Function):
    """The nearest level of each weight; the gradient passes as if there were no rounding, within the levels."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, format: Format) -> Tensor:
        ctx.save_for_backward(latent.abs() <= 1)
        return format.levels.to(latent.device)[_codes(latent, format).int()]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


def _codes(latent: Tensor, format: Format) -> Tensor:
    return format.nearest(latent.clamp(-1, 1).float())
