"""Models whose weights are numbers of 16 bits: computed in float32, stored as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within the block, hold weights of 16 bits in float32; afterwards the very same tensors as before.

    Codes and scales of packed weights stay what they are.
    """
    if not any(parameter.dtype in HALVES for parameter in model.parameters()):
        yield
        return
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()
    ]
    try:
        nn.Module.float(model)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def widened(inputs: Any) -> Any:
    """Return inputs with tensors of 16 bits in float32."""
    return tree_map(
        lambda item: item.float() if isinstance(item, Tensor) and item.dtype in HALVES else item, inputs
    )


def as_stored(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as an array of its own type, which numpy knows bfloat16 by from `ml_dtypes`."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().to("cpu").contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.detach().to("cpu").numpy())
