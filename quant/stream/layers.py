"""Which tensors of a checkpoint are linear layers, and which process takes which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.apply import layer_seed
from quant.config import check_formats
from quant.errors import QuantError
from quant.stream.config import StreamConfig
from quant.stream.header import StoredTensor

DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A matrix to quantize.

    Attributes:
        name: Of the layer: its key without ".weight", or the stack's and the index.
        weight: The tensor that holds it.
        index: Which matrix of a stack; None for a tensor that is the matrix.
        bias: The tensor of its bias, which goes with it unchanged.
        format: The format it gets.
        seed: Of its random start: that of `loftq_model`, the same in whatever order, by whichever process.
    """

    name: str
    weight: StoredTensor
    index: int | None
    bias: StoredTensor | None
    format: str
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        rows, columns = self.weight.shape[-2:]
        return rows, columns


def find_layers(tensors: Mapping[str, StoredTensor], config: StreamConfig) -> list[Layer]:
    """Return the linear layers of a checkpoint, sorted by name.

    Raises:
        QuantError: There is none, one is of a dtype that is not computed with, or a format is for none of them.
    """
    layers = [layer for key in sorted(tensors) for layer in _layers_of(key, tensors, config)]
    if not layers:
        raise QuantError(
            "no tensor of the checkpoint is taken as a linear layer", "widen include, narrow exclude"
        )
    check_formats(config.formats, [layer.name for layer in layers])
    return layers


def share(layers: Sequence[Layer], process: int, processes: int) -> list[Layer]:
    """Return the layers that one of several processes takes, so that all have about as many weights.

    The largest layers are dealt first, each to the process with the least so far (Graham's LPT rule); every
    process comes to the same result by itself.
    """
    loads = [0] * processes
    taken: list[Layer] = []
    for layer in sorted(layers, key=lambda layer: (-layer.shape[0] * layer.shape[1], layer.name)):
        least = loads.index(min(loads))
        loads[least] += layer.shape[0] * layer.shape[1]
        if least == process:
            taken.append(layer)
    return sorted(taken, key=lambda layer: layer.name)


def _layers_of(key: str, tensors: Mapping[str, StoredTensor], config: StreamConfig) -> list[Layer]:
    tensor, name = tensors[key], key.removesuffix(".weight")
    matrix = len(tensor.shape) == 2 and name != key and config.includes(name)
    stack = len(tensor.shape) == 3 and config.takes_stack(name)
    if not (matrix or stack):
        return []
    if tensor.dtype not in DTYPES or not all(tensor.shape):
        raise QuantError(
            f"{key} is {tensor.dtype} of shape {tensor.shape}, and {', '.join(DTYPES)} of some size can be quantized",
            "exclude it, or convert the checkpoint to bfloat16",
        )
    bias = tensors.get(f"{name}.bias") if matrix else None
    names = [(name, None)] if matrix else [(f"{name}.{index}", index) for index in range(tensor.shape[0])]
    return [
        Layer(
            name=each, weight=tensor, index=index, bias=bias,
            format=config.format_of(each), seed=layer_seed(config.seed, each),
        )
        for each, index in names
    ]  # fmt: skip
