"""Second moments on both sides of the weights that read gated units, gathered in one pass with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.saliency.activations import Reader, not_called, observable_dim, readers
from graphprune.saliency.effective import EffectiveWeight
from graphprune.saliency.gradient import differentiable_losses
from graphprune.saliency.registry import Evidence
from graphprune.saliency.units import Place


@dataclass(frozen=True, slots=True)
class Curvature:
    """The Kronecker factors of the loss's curvature in a weight.

    Attributes:
        matrix: The weight.
        places: Where gated groups have units along its input.
        inputs: Mean of x xᵀ over tokens (in, in), float32.
        outputs: Mean of g gᵀ over tokens (out, out), float32, g the gradient of a window's loss by an output.
    """

    matrix: EffectiveWeight
    places: tuple[Place, ...]
    inputs: Tensor
    outputs: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in effect (out, in), float32, made anew at each access."""
        return torch.cat([chunk.effective for chunk in self.matrix.chunks()])


def curvatures(evidence: Evidence) -> list[Curvature]:
    """Run the calibration batches once, forward and backward, and return the curvature of all weights that read units.

    No `grad` is touched.

    Raises:
        TrainingError: If one of them is no linear layer of its own, there is no batch, or the loss is not finite.

    Source: Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature"
    (arXiv 1503.05671), with the empirical Fisher information.
    """
    found = readers(evidence)
    sums = _Sums()
    with _observing(evidence.model, found, sums):
        for loss in differentiable_losses(evidence):
            sums.add_outputs(loss)
    return [
        Curvature(
            reader.weight,
            reader.places,
            sums.inputs[reader.consumer.source] / sums.tokens[reader.consumer.source],
            sums.outputs[reader.consumer.parameter] / sums.tokens[reader.consumer.source],
        )
        for reader in found
    ]


@dataclass(slots=True)
class _Sums:
    """Sums over tokens so far, and the outputs of the pass that runs.

    Attributes:
        inputs: Of x xᵀ, by activation.
        outputs: Of g gᵀ, by weight.
        tokens: How many, by activation.
        produced: Outputs whose gradients are to come, each with the weight that made it.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    produced: list[tuple[str, Tensor]] = field(default_factory=list)

    def add_inputs(self, source: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Add what a module reads."""
        tokens = arguments[0].detach().flatten(0, -2).float()
        self.inputs[source] = self.inputs.get(source, 0) + tokens.T @ tokens
        self.tokens[source] = self.tokens.get(source, 0) + len(tokens)

    def keep_output(self, reader: Reader, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Remember what a module puts out."""
        rows = _rows(reader)
        if not isinstance(output, Tensor) or output.shape[-1] != rows:
            raise _no_linear_layer(reader)
        self.produced.append((reader.consumer.parameter, output))

    def add_outputs(self, loss: Tensor) -> None:
        """Add the gradients of a loss by the outputs that led to it."""
        names, outputs = [name for name, _ in self.produced], [output for _, output in self.produced]
        self.produced.clear()
        gradients = torch.autograd.grad(loss, outputs, materialize_grads=True) if outputs else ()
        for name, gradient in zip(names, gradients, strict=True):
            tokens = gradient.flatten(0, -2).float()
            self.outputs[name] = self.outputs.get(name, 0) + tokens.T @ tokens


@contextmanager
def _observing(model: nn.Module, found: list[Reader], sums: _Sums) -> Iterator[None]:
    """Within the block, add up what readers read and put out.

    Raises:
        TrainingError: If one of them is no linear layer, or was never called.
    """
    handles = []
    for reader in found:
        consumer = reader.consumer
        if observable_dim(consumer) != -1:
            raise _no_linear_layer(reader)
        module = model.get_submodule(consumer.module)
        handles.append(module.register_forward_pre_hook(partial(sums.add_inputs, consumer.source)))
        handles.append(module.register_forward_hook(partial(sums.keep_output, reader)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for reader in found:
        if reader.consumer.parameter not in sums.outputs:
            raise not_called(reader.consumer)


def _rows(reader: Reader) -> int:
    shape = list(reader.weight.shape)
    del shape[reader.weight.input_axis]
    return int(torch.Size(shape).numel())


def _no_linear_layer(reader: Reader) -> TrainingError:
    return TrainingError(
        f"'{reader.consumer.module}', which reads units by {reader.consumer.parameter}, is no linear layer",
        "score by another saliency, such as fisher, or leave this kind out (recipe: prune.saliency, prune.kinds)",
    )
