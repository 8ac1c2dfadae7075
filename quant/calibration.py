"""Covariances of the inputs that layers get on calibration text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import QuantError

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
"""What a model is called with: one tensor, keyword arguments, or positional arguments."""


def collect_covariances(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Iterable[str],
    importance: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the mean of ``x^T x`` over all inputs x that each layer gets while the model runs.

    Args:
        model: Run in evaluation mode without gradients.
        batches: What it is called with, in turn.
        names: Qualified names of the layers wanted; they take (..., in_features).
        importance: What the inputs of each call of a layer count; those of layers that are not in it count 1.

    Returns:
        float32 (in_features, in_features) by name. Layers that no input reached are left out, such as experts
        that were never chosen.

    Raises:
        QuantError: There is no batch.
    """
    modules = dict(model.named_modules())
    sums = {name: InputSum() for name in names}
    with evaluation(model), ExitStack() as hooks, torch.no_grad():
        for name, total in sums.items():
            rows = iter((importance or {}).get(name, ()))
            hooks.enter_context(watched(modules[name], partial(_add_next, total, rows)))
        for batch in as_batches(batches):
            call(model, batch)
    return {name: total.mean() for name, total in sums.items() if total.rows}


def as_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Return calibration batches as a list.

    Raises:
        QuantError: There is none, or one batch is given in place of several.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise QuantError(
            f"the calibration batches are one {_described(batches)}",
            "pass a list of batches, such as ids.split(4) for token ids (windows, length)",
        )
    found = list(batches)
    if not found:
        raise QuantError("there is no calibration batch", "pass at least one, such as a tensor of token ids")
    return found


def _add_next(total: InputSum, importance: Iterator[Tensor], inputs: Tensor) -> None:
    total.add(inputs, importance=next(importance, None))


class InputSum:
    """A running sum of ``y^T x`` over rows of two inputs, of ``x^T x`` where they are one."""

    def __init__(self) -> None:
        self.rows = 0
        self._total: Tensor | None = None

    def add(self, inputs: Tensor, others: Tensor | None = None, importance: Tensor | None = None) -> None:
        """Add inputs.

        Args:
            inputs: (..., in_features).
            others: Of the same shape, to pair them with.
            importance: (rows,), what each of them counts. Without it, or where the rows are others, such as
                those that a router sends here by now, each counts 1.
        """
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        left = flat if others is None else others.detach().reshape(flat.shape).to(torch.float32)
        if importance is not None and len(importance) == len(flat):
            left = left * importance[:, None]
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
    """Call a model with one calibration batch, and without a key-value cache where its forward can do so.

    Raises:
        QuantError: The model cannot be run on it; the message ends with what the model itself says.
    """
    keywords = dict(batch) if isinstance(batch, Mapping) else {}
    arguments = (
        () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    )
    if "use_cache" in inspect.signature(model.forward).parameters:
        keywords.setdefault("use_cache", False)
    try:
        return model(*arguments, **keywords)
    except Exception as error:  # whatever a stranger's forward raises
        raise QuantError(
            f"{type(model).__name__} cannot be run on a calibration batch, a {_described(batch)}: {error}",
            "pass batches that the model's forward takes, such as ids.split(4) for token ids (windows, length)",
        ) from error


def _described(batch: object) -> str:
    shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
    return f"{type(batch).__name__}{shape}"


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
