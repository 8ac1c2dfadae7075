"""A linear layer with a packed, frozen weight and trainable low-rank adapters."""

# ruff: noqa: N803, N806 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.errors import QuantError
from quant.packed import PackedWeight
from quant.quantized import QuantizedTensor

TILE = 1 << 22
"""Weights that are dequantized at a time: 16 MB in float32."""


class QuantLinear(PackedWeight):
    """``y = x Q^T + scaling (x A^T) B^T + bias`` with Q packed and frozen; gradients reach A, B and x.

    The constructor takes the factors as they are stored; `from_parts` takes factors of the product.

    Args:
        quantized: Q of shape (out_features, in_features).
        bias: (out_features,), frozen, or None.
        lora_A: (rank, in_features) or None; trainable. An `nn.Parameter` is used as it is.
        lora_B: (out_features, rank) or None; trainable. An `nn.Parameter` is used as it is.
        scaling: Factor of the adapters' product, above 0.
        dtype: The dtype of `weight`.
        transposed: Whether the layer whose place this one takes stores its weight (in, out), which `quant.json` says;
            the `weight` of this one is (out, in) all the same.

    Attributes:
        in_features: Length of an input row.
        out_features: Length of an output row.
        scaling: Factor of the adapters' product.
        transposed: As above.

    Raises:
        QuantError: A part does not fit the others.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None = None,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        super().__init__(quantized, dtype)
        self.transposed = transposed
        self.out_features, self.in_features = quantized.shape
        _check_parts(self.shape, bias, lora_A, lora_B)
        _check_scaling(scaling)
        self.scaling = scaling
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.lora_A = _trainable(lora_A)
        self.lora_B = _trainable(lora_B)

    @classmethod
    def from_parts(
        cls,
        quantized: QuantizedTensor,
        bias: Tensor | None = None,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> QuantLinear:
        """Build a layer whose adapters contribute exactly ``lora_B @ lora_A``, whatever `scaling` is.

        Each factor is divided by ``sqrt(scaling)`` before it is stored, so that ``scaling * B A`` is the
        product given; stored as they are, LoftQ's factors would be over- or undercorrected by the scaling.

        Args:
            quantized: Q of shape (out_features, in_features).
            bias: (out_features,) or None.
            lora_A: (rank, in_features) or None; copied to float32.
            lora_B: (out_features, rank) or None; copied to float32.
            scaling: Factor of the adapters' product in training, such as alpha / rank; above 0.
            dtype: The dtype of `weight`.
        """
        _check_scaling(scaling)
        scaled_A, scaled_B = _divided(lora_A, math.sqrt(scaling)), _divided(lora_B, math.sqrt(scaling))
        return cls(quantized, bias, scaled_A, scaled_B, scaling, dtype)

    @property
    def rank(self) -> int:
        """Rank of the adapters; 0 without any."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    @property
    def weight(self) -> Tensor:
        """The weight in effect, ``Q + scaling B A``, dense, computed anew at each access."""
        weight = self.quantized.dequantize(self.dtype)
        if self.lora_A is not None and self.lora_B is not None:
            weight = weight + (self.scaling * (self.lora_B @ self.lora_A)).to(self.dtype)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output (..., out_features) in the input's dtype, or autocast's."""
        output = self._frozen_part(input)
        if self.lora_A is None or self.lora_B is None:
            return output
        hidden = functional.linear(input, self.lora_A.to(input.dtype))
        update = functional.linear(hidden, self.lora_B.to(input.dtype))
        return torch.add(output, update, alpha=self.scaling)

    def extra_repr(self) -> str:
        """Return shape, format and adapters for `print(model)`."""
        adapters = f"rank={self.rank}, scaling={self.scaling:g}"
        return f"{super().extra_repr()}, {adapters}, bias={self.bias is not None}"

    def _frozen_part(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        dense = self.cached()
        if dense is None:
            return _QuantizedLinear.apply(input, bias, self.quantized)
        if not torch.is_autocast_enabled(input.device.type):
            dense = dense.to(input.dtype)
        return functional.linear(input, dense, bias)


class _QuantizedLinear(torch.autograd.Function):
    """``x Q^T + bias``, forward and backward, with a tile of the dense weight at a time and nothing kept of it."""

    @staticmethod
    def forward(input: Tensor, bias: Tensor | None, quantized: QuantizedTensor) -> Tensor:
        parts = [
            functional.linear(input, tile.dequantize(input.dtype), None if bias is None else bias[start:stop])
            for start, stop, tile in quantized.tiles(TILE)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, QuantizedTensor], output: Tensor
    ) -> None:
        ctx.quantized = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_input = None
        if ctx.needs_input_grad[0]:
            to_input = gradient.new_zeros(*gradient.shape[:-1], ctx.quantized.shape[1])
            for start, stop, tile in ctx.quantized.tiles(TILE):
                to_input += gradient[..., start:stop] @ tile.dequantize(gradient.dtype)
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_input, to_bias, None


def _divided(factor: Tensor | None, divisor: float) -> Tensor | None:
    return None if factor is None else factor.detach().float() / divisor


def _trainable(factor: Tensor | None) -> nn.Parameter | None:
    if factor is None or isinstance(factor, nn.Parameter):
        return factor
    return nn.Parameter(factor.contiguous())  # of one layout, whether made here or loaded


def _check_parts(
    shape: tuple[int, ...], bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None
) -> None:
    out_features, in_features = shape
    if bias is not None and bias.shape != (out_features,):
        raise QuantError(f"a bias of shape {tuple(bias.shape)}", f"pass ({out_features},)")
    if (lora_A is None) != (lora_B is None):
        raise QuantError("only one of the factors lora_A and lora_B is given", "pass both or none")
    if lora_A is not None and lora_B is not None:
        rank = lora_A.shape[0]
        if lora_A.shape != (rank, in_features) or lora_B.shape != (out_features, rank):
            raise QuantError(
                f"factors lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit {shape}",
                f"pass (rank, {in_features}) and ({out_features}, rank)",
            )


def _check_scaling(scaling: float) -> None:
    if not (math.isfinite(scaling) and scaling > 0):
        raise QuantError(f"a scaling of {scaling}", "pass a finite number above 0")
