"""A module whose weight is kept packed: buffers that survive casts, stay shared, and dequantize on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quant.errors import QuantError
from quant.format_mark import check_mark, mark_of
from quant.quantized import QuantizedTensor


class PackedWeight(nn.Module):
    """The frozen, packed weight of a layer.

    `to`, `half` and the like move the buffers but never cast them: the scales stay float32. Modules that
    share their buffers (a tied embedding and output head) still share them after a move.

    Args:
        quantized: A packed matrix; its parts become buffers of their names, not copies of them.
        dtype: The dtype of the weight as others see it; `to(dtype)` changes it.

    Raises:
        QuantError: The tensor has a number of dimensions that the layer cannot take.
    """

    dimensions: ClassVar[tuple[int, ...]] = (2,)
    codes: Tensor
    _dtype_mark: Tensor

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if len(quantized.shape) not in self.dimensions:
            raise QuantError(
                f"a weight of shape {quantized.shape} is not that of a {type(self).__name__}",
                f"pass one of {' or '.join(map(str, self.dimensions))} dimensions",
            )
        self.shape = quantized.shape
        self.format = quantized.format
        self.block_size = quantized.block_size
        self.part_names = tuple(quantized.parts())
        for name, part in quantized.parts().items():
            self.register_buffer(name, part)
        # Empty: it only lets every way of casting a module reach the dtype of the weight.
        self.register_buffer("_dtype_mark", torch.empty(0, dtype=dtype), persistent=False)
        self._cache_dtype: torch.dtype | None = None
        self._cache: Tensor | None = None

    @property
    def quantized(self) -> QuantizedTensor:
        """The packed weight over the live buffers."""
        parts = {name: self.get_buffer(name) for name in self.part_names}
        return QuantizedTensor.from_parts(
            parts, shape=self.shape, format=self.format, block_size=self.block_size
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight has for others."""
        return self._dtype_mark.dtype

    def cached(self) -> Tensor | None:
        """Return the dequantized weight inside `cache_dequantized`, else None."""
        if self._cache_dtype is not None and self._cache is None:
            # Evaluation may come first, and autograd refuses tensors made in inference mode.
            with torch.inference_mode(False):
                self._cache = self.quantized.dequantize(self._cache_dtype)
        return self._cache

    def extra_repr(self) -> str:
        """Return shape and format for `print(model)`."""
        return f"{self.shape[1]}, {self.shape[0]}, format={self.format}, block_size={self.block_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        packed = {name: self._buffers[name] for name in self.part_names}
        super()._apply(fn, recurse)
        for name, before in packed.items():
            after = self._buffers[name]
            if before is None or after is None:
                continue
            if after.dtype != before.dtype:
                after = before.to(after.device)
            if after.is_meta == before.is_meta:
                # As nn.Module does for parameters: the object stays, so whoever shares it sees the move.
                before.data = after
                after = before
            self._buffers[name] = after
        self._cache = None
        return self

    def get_extra_state(self) -> Tensor:
        """Return what a state dict holds beside the parts: the format's name."""
        return mark_of(self.format)

    def set_extra_state(self, state: Tensor) -> None:
        """Take nothing over: the format is the layer's own, and has been compared."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        check_mark(state_dict, prefix, self.format)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._cache = None


@contextmanager
def cache_dequantized(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Keep the dequantized weights of a model's `QuantLinear` layers while the block runs.

    Each layer dequantizes once, at its first use, instead of once a forward and once a backward. That costs
    the memory of the dense weights in `dtype`: meant for training loops where memory is no issue. The frozen
    base never changes in training, so nothing goes stale; a move or a loaded state dict drops what was kept.

    Args:
        model: Any module tree, or one layer.
        dtype: Of the kept weights; best the dtype that the layers compute in (under autocast, autocast's).
    """
    layers = [module for module in model.modules() if isinstance(module, PackedWeight)]
    before = [layer._cache_dtype for layer in layers]
    try:
        for layer in layers:
            layer._cache_dtype, layer._cache = dtype, None
        yield
    finally:
        for layer, cache_dtype in zip(layers, before, strict=True):
            layer._cache_dtype, layer._cache = cache_dtype, None
