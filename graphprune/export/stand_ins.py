"""Stand-ins: while a model is traced, each of its matrices is one opaque operator that knows a module's name.

The tracer then never sees a weight. Its cost depends on the number of operators alone, packed weights are
neither unpacked nor renamed, and `graphprune.export.modules` later writes what belongs in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.onnx
from torch import Tensor, nn

from quant import PackedParameter, QuantEmbedding, QuantError, QuantLinear
from quant.row_scale import row_scale

DOMAIN = "graphprune"
LINEAR = "Linear"
EMBEDDING = "Embedding"
WEIGHT = "Weight"


class _StandIn(nn.Module):
    """A matrix module whose weight, bias and sizes may be read by the code around it, as those of tied ones are."""

    def __init__(
        self, name: str, operator: str, shape: Sequence[int], bias: Tensor | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.bias = bias
        self.scale = scale
        self.name = name
        self.operator = operator
        self.shape = tuple(shape)
        if operator == LINEAR:
            self.out_features, self.in_features = shape
        else:
            self.num_embeddings, self.embedding_dim = shape

    @property
    def weight(self) -> Tensor:
        return opaque(WEIGHT, (), self.shape, module=self.name)

    def forward(self, x: Tensor) -> Tensor:
        shape = (
            (*x.shape[:-1], self.out_features) if self.operator == LINEAR else (*x.shape, self.embedding_dim)
        )
        y = opaque(self.operator, (x,), shape, module=self.name)
        return y if self.scale == 1 else y * self.scale


class _ParameterStandIn(nn.Module):
    def __init__(self, name: str, original: PackedParameter) -> None:
        super().__init__()
        self.name = name
        *stack, rows, columns = original.shape
        self.shape = (*stack, columns, rows) if original.transposed else (*stack, rows, columns)

    def forward(self, original: Tensor) -> Tensor:
        return opaque(WEIGHT, (), self.shape, module=self.name)


def opaque(operator: str, inputs: Sequence[Tensor], shape: Sequence[int], module: str = "") -> Tensor:
    """Become one ONNX node of `DOMAIN`, whose value is of no matter: nothing is computed with it."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", inputs, {"module": module}, dtype=torch.float32, shape=shape, version=1
    )


def stand_in(name: str, module: nn.Module) -> nn.Module | None:
    """Return the stand-in of a matrix module, or None for a module that is traced as it is.

    What computes something else than its base does is traced as it is. The constant of an embedding that multiplies
    its rows by one is traced beside its stand-in.
    """
    if type(module) is nn.Linear:
        return _StandIn(name, LINEAR, module.weight.shape, module.bias)
    if isinstance(module, QuantLinear):
        return _StandIn(name, LINEAR, module.shape, module.bias)
    if isinstance(module, QuantEmbedding):
        return _StandIn(name, EMBEDDING, module.shape, scale=module.scale)
    if isinstance(module, nn.Embedding):
        return _embedding(name, module)
    return _ParameterStandIn(name, module) if isinstance(module, PackedParameter) else None


def _embedding(name: str, module: nn.Embedding) -> _StandIn | None:
    try:
        scale = row_scale(module, name)
    except QuantError:  # it computes something else, which the tracer will see
        return None
    return _StandIn(name, EMBEDDING, module.weight.shape, scale=scale)


@contextmanager
def replaced(model: nn.Module, replacements: dict[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of named ones, and the originals back at the end, error or not."""
    originals = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
