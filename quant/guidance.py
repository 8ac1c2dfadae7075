"""How much an error at a layer's outputs matters, token by token: what the loss's gradient is there.

To second order an output error e_t raises the loss by a half of ``(g_t . e_t)^2``, with g_t the gradient there in
place of the Hessian (Fisher information). Where nothing is known of the direction of e_t, that is ``mean(g_t^2)
||e_t||^2``: a weight for each token, and a scale on which the errors of different layers may be compared.

Source: Kim et al., GuidedQuant (arXiv 2505.07004), with all output channels in one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration import Batch, as_batches, call, evaluation
from quant.errors import QuantError

Loss = Callable[[Any], Tensor]
"""From what a model returns to its loss, such as ``lambda output: output.loss``."""

LARGEST = 50.0
"""Times the mean that one token counts at most: a single token, such as the first, may hold most of a gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """What the output rows of one layer count.

    Attributes:
        calls: For each call of the layer float32 (rows,); their mean over all calls is 1.
        scale: Mean square of the loss's gradient at one output, by which layers compare.
    """

    calls: list[Tensor]
    scale: float


def check_loss(loss: Loss | None, batches: object) -> None:
    """Raise QuantError for a loss that there is no text for."""
    if loss is not None and batches is None:
        raise QuantError(
            "a loss without calibration batches", "pass `batches`, with labels if the loss needs them"
        )


def token_importance(
    model: nn.Module, batches: Iterable[Batch], names: Iterable[str], loss: Loss
) -> dict[str, Importance]:
    """Return what the output rows of each layer count: the mean squares of the loss's gradient there.

    Args:
        model: Run in evaluation mode; its parameters gather no gradients.
        batches: What it is called with, in turn.
        names: Qualified names of the layers; they give (..., out_features).
        loss: Of what the model returns.

    Returns:
        By layer, but for those that no gradient reached.

    Raises:
        QuantError: The model cannot be run, or the loss is no finite number that depends on its layers.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    anchor, seen = torch.zeros((), requires_grad=True), dict.fromkeys(found, 0)
    with evaluation(model), ExitStack() as hooks, torch.enable_grad():
        for name, calls in found.items():
            handle = modules[name].register_forward_hook(partial(_watch, anchor, calls))
            hooks.callback(handle.remove)
        for batch in as_batches(batches):
            value = loss(call(model, batch))
            _check(value)
            # Towards the anchor alone: the parameters' own gradients are neither needed nor touched.
            torch.autograd.backward(value, inputs=[anchor])
            del value
            seen = _moved_together(found, seen)
    return {name: _clipped(calls) for name, calls in found.items() if any(bool(rows.any()) for rows in calls)}


def _watch(anchor: Tensor, calls: list[Tensor], module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Make a layer's output depend on the anchor, and note the gradient that comes back to it."""
    watched = output + anchor.to(output)
    position = len(calls)
    calls.append(torch.zeros(output.shape[:-1].numel(), device=output.device))

    def note(gradient: Tensor) -> None:
        calls[position] = gradient.detach().flatten(0, -2).to(torch.float32).square().mean(dim=-1)

    watched.register_hook(note)
    return watched


def _moved_together(found: dict[str, list[Tensor]], seen: dict[str, int]) -> dict[str, int]:
    """Move what the calls behind the first `seen` left into one piece of memory, and return how many there are now.

    Left where they were made, between a pass's activations, thousands of small tensors keep the allocator from using
    that memory again, and it grows by a tenth of a pass's activations with each pass.
    """
    fresh = [rows for name, calls in found.items() for rows in calls[seen[name] :]]
    together = torch.cat([rows.cpu() for rows in fresh]).split([len(rows) for rows in fresh]) if fresh else ()
    moved = iter(together)
    for name, calls in found.items():
        calls[seen[name] :] = [next(moved).to(rows.device) for rows in calls[seen[name] :]]
    return {name: len(calls) for name, calls in found.items()}


def _clipped(calls: list[Tensor]) -> Importance:
    scale = float(torch.cat(calls).mean())
    clipped = [rows.clamp(max=LARGEST * scale) for rows in calls]
    mean = torch.cat(clipped).mean()
    return Importance([rows / mean for rows in clipped], scale)


def _check(value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise QuantError(
            f"the loss is a {type(value).__name__} without a gradient",
            "return one number that is computed from what the model returns, such as `output.loss`",
        )
    if not bool(value.isfinite()):
        raise QuantError(f"the loss on a calibration batch is {float(value)}", "calibrate on ordinary text")
