"""The weight in effect, W + scaling · B A, and a stand-in for its gradient, in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import TrainingError
from graphprune.saliency.adapters import Factors, low_rank_updates

CHUNK = 1 << 22
"""Weights that are looked at together: 16 MB in float32."""


Gradients = Mapping[str, Tensor]
"""Of factors, by their names."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a weight (rows, in), in float32. Several low-rank terms stand here as one.

    Attributes:
        rows: Which ones.
        frozen: W, (rows, in).
        up: B, (rows, rank).
        down: A, (rank, in).
        scaling: Of each rank, (rank,).
        terms: The terms' names.
    """

    rows: slice
    frozen: Tensor
    up: Tensor
    down: Tensor
    scaling: Tensor
    terms: tuple[Factors, ...]

    @property
    def update(self) -> Tensor:
        """Scaling · B A."""
        return (self.up * self.scaling) @ self.down

    @property
    def effective(self) -> Tensor:
        """W + scaling · B A."""
        return self.frozen + self.update

    def surrogate(self, gradients: Gradients) -> Tensor:
        """Return what stands in for the weight's gradient: ∂L/∂B A + B ∂L/∂A − ∂L/∂B ∂L/∂A.

        It is the negative of how B A moves in a step of gradient descent with rate 1 on both factors.

        Source: LoRAPrune (arXiv 2305.18403).
        """
        up = torch.cat([gradients[term.up][self.rows] for term in self.terms], 1).float()
        down = torch.cat([gradients[term.down] for term in self.terms]).float()
        return up @ self.down + (self.up - up) @ down


@dataclass(frozen=True, slots=True)
class EffectiveWeight:
    """A weight with its low-rank updates, if it has any.

    Attributes:
        model: The model that owns it.
        name: Its qualified name.
        input_axis: Its axis that is contracted.
        shape: Its shape.
        terms: Its low-rank updates.
    """

    model: nn.Module
    name: str
    input_axis: int
    shape: tuple[int, ...]
    terms: tuple[Factors, ...] = ()

    def factors(self) -> dict[str, nn.Parameter]:
        """Return all factors by name."""
        names = [name for term in self.terms for name in (term.down, term.up)]
        return {name: self.model.get_parameter(name) for name in names}

    def chunks(self) -> Iterator[Chunk]:
        """Yield the rows, a chunk at a time; axes other than the contracted one are flattened into them."""
        matrix = numbers_of(self.model, self.name, self.shape).movedim(self.input_axis, -1).flatten(0, -2)
        up, down, scaling = self._stacked(len(matrix), matrix.shape[1], matrix.device)
        step = max(1, CHUNK // matrix.shape[1])
        for start in range(0, len(matrix), step):
            rows = slice(start, start + step)
            yield Chunk(rows, matrix[rows].float(), up[rows], down, scaling, self.terms)

    def _stacked(self, outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return all terms as one: B (out, ranks), A (ranks, in) and the scaling of each rank."""
        factors = {name: factor.detach().float() for name, factor in self.factors().items()}
        ups = [torch.zeros(outputs, 0, device=device), *(factors[term.up] for term in self.terms)]
        downs = [torch.zeros(0, inputs, device=device), *(factors[term.down] for term in self.terms)]
        scaling = [downs[0].new_full((len(factors[term.down]),), term.scaling) for term in self.terms]
        return torch.cat(ups, 1), torch.cat(downs), torch.cat([downs[0].new_zeros(0), *scaling])


def effective_weights(model: nn.Module, groups: NodeGroups) -> dict[str, EffectiveWeight]:
    """Return the weights of a model that have low-rank updates, by name."""
    return {
        name: EffectiveWeight(
            model, name, update.input_axis, groups.graph.weights[name].shape, update.factors
        )
        for name, update in low_rank_updates(groups.graph).items()
    }


def numbers_of(model: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a weight's numbers, detached; a quantized one's are dequantized, where its module or PEFT can.

    Raises:
        TrainingError: If it holds codes that nobody can turn into numbers.
    """
    from peft.utils.integrations import dequantize_module_weight

    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    try:
        held = dequantize_module_weight(module) if attribute == "weight" else getattr(module, attribute)
    except (AttributeError, TypeError):  # no tensor of that name
        held = None
    if not isinstance(held, Tensor) or not held.is_floating_point() or tuple(held.shape) != tuple(shape):
        what = f"{held.dtype} of shape {tuple(held.shape)}" if isinstance(held, Tensor) else "packed data"
        raise TrainingError(
            f"{name} is held as {what}, and this saliency looks at its {' × '.join(map(str, shape))} numbers",
            "use a saliency that looks at gates alone: fisher or taylor",
        )
    return held.detach()
