"""A stack of experts that is kept packed and decodes the experts a forward asks for, the last used ones kept."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from quant.errors import QuantError
from quant.format_mark import check_mark, mark_of
from quant.quantized import QuantizedTensor
from quant.ternary.pickling import with_uint16, without_uint16
from quant.ternary.tensor import TernaryTensor


class DecodedExperts:
    """Decoded experts, the least recently used dropped first; layers may share one, and so its bound.

    Args:
        most_bytes: What all experts kept may fill; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._kept: OrderedDict[tuple[object, int], Tensor] = OrderedDict()

    def get(self, owner: object, expert: int, decode: Callable[[], Tensor]) -> Tensor:
        """Return an expert of an owner, decoded now if it is not kept."""
        key = owner, expert
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        dense = decode()
        if dense.nbytes <= self.most_bytes:
            self._kept[key] = dense
            self.nbytes += dense.nbytes
        while self.nbytes > self.most_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return dense

    def drop(self, owner: object) -> None:
        """Forget all experts of an owner."""
        for key in [key for key in self._kept if key[0] is owner]:
            self.nbytes -= self._kept.pop(key).nbytes

    def __reduce__(self) -> tuple[type[DecodedExperts], tuple[int]]:
        """Have a copy, and what comes out of a pickle, begin empty."""
        return DecodedExperts, (self.most_bytes,)


class PackedExperts(nn.Module):
    """Stands in the place of a parameter (experts, rows, columns) in code that indexes it by expert.

    Set as the attribute of that name, it serves forwards that read ``self.gate_up_proj[expert]``, such as those of
    transformers 5 with ``experts_implementation="eager"``; ones that need all experts in one tensor ask
    `dequantize`. Moves and casts keep what is stored bit for bit; a cast changes the dtype of decoded experts.

    Args:
        quantized: What `quantize_experts` returned, of shape (experts, rows, columns).
        dtype: Of decoded experts.
        decoded: Where decoded experts are kept; None keeps none.

    Raises:
        QuantError: The tensor is not a stack.
    """

    _dtype_mark: Tensor

    def __init__(
        self,
        quantized: TernaryTensor | QuantizedTensor,
        dtype: torch.dtype = torch.float32,
        decoded: DecodedExperts | None = None,
    ) -> None:
        super().__init__()
        if len(quantized.shape) != 3:
            raise QuantError(f"a weight of shape {quantized.shape} is no stack of experts", "pass three axes")
        self.shape = quantized.shape
        self.decoded = DecodedExperts(0) if decoded is None else decoded
        self._rebuild = _rebuild(quantized)
        self._format = _format_of(quantized)
        self.part_names = tuple(quantized.parts())
        for name, part in quantized.parts().items():
            self.register_buffer(name, part)
        # Empty: it only lets every way of casting a module reach the dtype of decoded experts.
        self.register_buffer("_dtype_mark", torch.empty(0, dtype=dtype), persistent=False)
        self._owner = object()

    @property
    def quantized(self) -> TernaryTensor | QuantizedTensor:
        """The packed stack over the live buffers."""
        return self._rebuild({name: self.get_buffer(name) for name in self.part_names})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of decoded experts."""
        return self._dtype_mark.dtype

    def __len__(self) -> int:
        """Return how many experts there are."""
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the experts in turn, each decoded as it is reached."""
        return (self[expert] for expert in range(len(self)))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """Return one expert (rows, columns), or for several indices (n,) a stack of them; not to be written to."""
        if not _counts(expert):
            raise QuantError(
                f"packed experts are asked for {expert!r}, which is no number of an expert",
                "ask for one by its number, for several by a tensor of numbers, or for all by dequantize()",
            )
        if isinstance(expert, Tensor) and expert.dim():
            return torch.stack([self[one] for one in expert])
        index = operator.index(expert)
        if not 0 <= index < len(self):
            raise QuantError(f"there is no expert {index} among {len(self)}", "count from 0, from the front")
        return self.decoded.get(self._owner, index, lambda: self._decode(index))

    def dequantize(self) -> Tensor:
        """Return all experts, dense; none of them is kept."""
        return self.quantized.dequantize(self.dtype)

    def extra_repr(self) -> str:
        """Return shape and bits for `print(model)`."""
        bits = 8 * sum(self.get_buffer(name).nbytes for name in self.part_names) / math.prod(self.shape)
        return f"{', '.join(map(str, self.shape))}, {bits:.3f} bits a weight"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        raise AttributeError(
            f"packed experts have no {name!r}: this forward wants them in one tensor; let it read them one by "
            "one (transformers: experts_implementation='eager'), or pass it dequantize()"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state, ready for pickle."""
        return {**self.__dict__, "_buffers": without_uint16(self._buffers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state that `__getstate__` returned."""
        super().__setstate__({**state, "_buffers": with_uint16(state["_buffers"])})

    def _decode(self, expert: int) -> Tensor:
        # Evaluation may come first, and autograd refuses tensors made in inference mode.
        with torch.inference_mode(False):
            quantized = self.quantized
            if isinstance(quantized, TernaryTensor):
                return quantized.dequantize(self.dtype, expert)
            return _two_bit_expert(quantized, expert, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        stored = {name: self.get_buffer(name) for name in self.part_names}
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self.decoded.drop(self._owner)
        return self

    def get_extra_state(self) -> Tensor:
        """Return what a state dict holds beside the parts: by which format and dictionary they are read."""
        return mark_of(self._format)

    def set_extra_state(self, state: Tensor) -> None:
        """Take nothing over: the format is the stack's own, and has been compared."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        check_mark(state_dict, prefix, self._format)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.decoded.drop(self._owner)


def replace_parameter_(module: nn.Module, name: str, packed: PackedExperts) -> None:
    """Put packed experts in the place of a module's parameter.

    Args:
        module: The module that has the parameter, such as a model's `experts`.
        name: Of the parameter in that module, such as "gate_up_proj".
        packed: Experts of the parameter's shape.

    Raises:
        QuantError: There is no such parameter, or its shape is another.
    """
    parameter = module._parameters.get(name)
    if parameter is None or tuple(parameter.shape) != packed.shape:
        found = "nothing" if parameter is None else f"a parameter {tuple(parameter.shape)}"
        raise QuantError(
            f"{name} of {type(module).__name__} is {found}, not one of shape {packed.shape}",
            "pass the module that has the parameter, and what was quantized from it",
        )
    delattr(module, name)
    setattr(module, name, packed)


def _counts(index: object) -> bool:
    """Whether it is a number, or a tensor of numbers, and no slice or mask."""
    if isinstance(index, Tensor):
        return index.dtype != torch.bool and not index.is_floating_point()
    return isinstance(index, SupportsIndex)


def _format_of(quantized: TernaryTensor | QuantizedTensor) -> str:
    if isinstance(quantized, TernaryTensor):
        return f"ternary (zeros {quantized.zeros}, longest {quantized.longest})"
    return quantized.format


def _rebuild(
    quantized: TernaryTensor | QuantizedTensor,
) -> Callable[[Mapping[str, Tensor]], TernaryTensor | QuantizedTensor]:
    """Return what makes a tensor like this one out of its parts, without a hold on them."""
    if isinstance(quantized, TernaryTensor):
        return partial(
            TernaryTensor.from_parts, shape=quantized.shape, zeros=quantized.zeros, longest=quantized.longest
        )
    return partial(
        QuantizedTensor.from_parts,
        shape=quantized.shape,
        format=quantized.format,
        block_size=quantized.block_size,
    )


def _two_bit_expert(quantized: QuantizedTensor, expert: int, dtype: torch.dtype) -> Tensor:
    experts, rows, columns = quantized.shape
    if rows * columns % quantized.block_size:
        return quantized.dequantize(dtype)[expert].clone()
    # Each expert as one row of whole blocks.
    flat = QuantizedTensor.from_parts(
        quantized.parts(),
        shape=(experts, rows * columns),
        format=quantized.format,
        block_size=quantized.block_size,
    )
    index = torch.tensor([expert], device=quantized.codes.device)
    return flat.rows(index).dequantize(dtype).view(rows, columns)
