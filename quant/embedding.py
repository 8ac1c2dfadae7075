"""An embedding with a packed, frozen weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quant.packed import PackedWeight
from quant.quantized import QuantizedTensor


class QuantEmbedding(PackedWeight):
    """Rows of a packed matrix, looked up by index.

    Where a row is a whole number of blocks, only the rows asked for are dequantized, else the whole matrix.

    Args:
        quantized: (num_embeddings, embedding_dim).
        dtype: The dtype of the output; `to(dtype)` changes it.
        scale: What the rows looked up are multiplied by; `weight` is the table as it is.

    Attributes:
        scale: What the rows looked up are multiplied by.
        num_embeddings: Number of rows.
        embedding_dim: Length of a row.

    Raises:
        QuantError: The tensor is not a matrix.
    """

    def __init__(
        self, quantized: QuantizedTensor, dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> None:
        super().__init__(quantized, dtype)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = quantized.shape

    @property
    def weight(self) -> Tensor:
        """The dense weight (num_embeddings, embedding_dim), computed anew at each access."""
        return self.quantized.dequantize(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of the integer indices `input` (...), times the scale."""
        rows = self._rows(input)
        return rows if self.scale == 1 else rows * self.scale

    def extra_repr(self) -> str:
        """Return shape, format and a scale other than 1 for `print(model)`."""
        scale = "" if self.scale == 1 else f", scale={self.scale:.6g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}, block_size={self.block_size}{scale}"

    def _rows(self, input: Tensor) -> Tensor:
        if self.embedding_dim % self.block_size:
            return functional.embedding(input, self.weight)
        rows = self.quantized.rows(input.reshape(-1))
        return rows.dequantize(self.dtype).view(*input.shape, self.embedding_dim)
