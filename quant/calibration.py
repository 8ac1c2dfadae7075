"""Covariances of the inputs that layers get on calibration text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import QuantError

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
"""What a model is called with: one tensor, keyword arguments, or positional arguments."""


def collect_covariances(
    model: nn.Module, batches: Iterable[Batch], names: Iterable[str]
) -> dict[str, Tensor]:
    """Return the mean of ``x^T x`` over all inputs x that each layer gets while the model runs.

    Args:
        model: Run in evaluation mode without gradients.
        batches: What it is called with, in turn.
        names: Qualified names of the layers wanted; they take (..., in_features).

    Returns:
        float32 (in_features, in_features) by name. Layers that no input reached are left out, such as experts
        that were never chosen.

    Raises:
        QuantError: There is no batch.
    """
    modules = dict(model.named_modules())
    sums = {name: InputSum() for name in names}
    count = 0
    with evaluation(model), ExitStack() as hooks, torch.no_grad():
        for name, total in sums.items():
            hooks.enter_context(watched(modules[name], total.add))
        for batch in batches:
            call(model, batch)
            count += 1
    if not count:
        raise QuantError("there is no calibration batch", "pass at least one, such as a tensor of token ids")
    return {name: total.mean() for name, total in sums.items() if total.rows}


class InputSum:
    """A running sum of ``y^T x`` over rows of two inputs, of ``x^T x`` where they are one."""

    def __init__(self) -> None:
        self.rows = 0
        self._total: Tensor | None = None

    def add(self, inputs: Tensor, others: Tensor | None = None) -> None:
        """Add inputs (..., in_features), and others of the same shape to pair them with."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        left = flat if others is None else others.detach().reshape(flat.shape).to(torch.float32)
        if self._total is None:
            self._total = flat.new_zeros(flat.shape[1], flat.shape[1])
        self._total.addmm_(left.T, flat)
        self.rows += len(flat)

    def mean(self) -> Tensor:
        """Return the mean over all rows: float32 (in_features, in_features)."""
        if self._total is None:
            raise QuantError("no input reached this layer", "calibrate on text that does")
        return self._total / self.rows


def call(model: nn.Module, batch: Batch) -> Any:
    """Call a model with one calibration batch, and without a key-value cache where its forward can do so."""
    keywords = dict(batch) if isinstance(batch, Mapping) else {}
    arguments = () if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else tuple(batch)
    if "use_cache" in inspect.signature(model.forward).parameters:
        keywords.setdefault("use_cache", False)
    return model(*arguments, **keywords)


@contextmanager
def watched(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show each first input of a module to `see` while the block runs."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        see(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode while the block runs; modules put in place of others take over theirs."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
