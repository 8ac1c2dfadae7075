"""Computing in bfloat16 while training, and putting every frozen weight back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from graphprune.recipe import Training


def use_bfloat16(training: Training, model: nn.Module) -> bool:
    """Return whether to compute in bfloat16: as asked, or where the model's device multiplies it natively."""
    if training.precision != "auto":
        return training.precision == "bfloat16"
    if next(model.parameters()).device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


@contextmanager
def frozen_in_bfloat16(*models: nn.Module) -> Iterator[None]:
    """Within the block, hold the frozen weights of models in bfloat16; afterwards the very same tensors as before.

    Autocast alone would convert every frozen weight anew in every forward pass, which on a CPU takes longer than
    the products. Trainable parameters stay in float32.

    Args:
        models: Models that may share weights.
    """
    frozen = {
        id(parameter): parameter
        for model in models
        for parameter in model.parameters()
        if not parameter.requires_grad and parameter.dtype == torch.float32
    }
    originals = {key: parameter.data for key, parameter in frozen.items()}
    try:
        for parameter in frozen.values():
            parameter.data = parameter.data.to(torch.bfloat16)
        yield
    finally:
        for key, parameter in frozen.items():
            parameter.data = originals[key]


@contextmanager
def computing_in_bfloat16(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within the block, compute in bfloat16 throughout, adapters' inputs included; if not wanted, change nothing."""
    if not wanted:
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with frozen_in_bfloat16(model), disable_input_dtype_casting(model):
        yield
