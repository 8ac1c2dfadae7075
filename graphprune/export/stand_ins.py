"""Stand-ins: while a model is traced, each of its matrices is one opaque operator that knows a module's name.

The tracer then never sees a weight. Its cost depends on the number of operators alone, packed weights are
neither unpacked nor renamed, and `graphprune.export.modules` later writes what belongs in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.onnx
from torch import Tensor, nn

from quant import QuantEmbedding, QuantLinear

DOMAIN = "graphprune"
LINEAR = "Linear"
EMBEDDING = "Embedding"


class _LinearStandIn(nn.Module):
    def __init__(self, name: str, original: nn.Linear | QuantLinear) -> None:
        super().__init__()
        self.name = name
        self.features = original.out_features

    def forward(self, x: Tensor) -> Tensor:
        return _node(LINEAR, x, self.name, (*x.shape[:-1], self.features))


class _EmbeddingStandIn(nn.Module):
    def __init__(self, name: str, features: int) -> None:
        super().__init__()
        self.name = name
        self.features = features

    def forward(self, ids: Tensor) -> Tensor:
        return _node(EMBEDDING, ids, self.name, (*ids.shape, self.features))


def _node(operator: str, x: Tensor, module: str, shape: tuple[int, ...]) -> Tensor:
    """Become one ONNX node of `DOMAIN`, whose value is of no matter: nothing is computed with it."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", (x,), {"module": module}, dtype=torch.float32, shape=shape, version=1
    )


def stand_in(name: str, module: nn.Module) -> nn.Module | None:
    """Return the stand-in of a matrix module, or None for a module that is traced as it is.

    Subclasses are traced as they are: they may compute something else than their base.
    """
    if type(module) is nn.Linear or isinstance(module, QuantLinear):
        return _LinearStandIn(name, module)
    if isinstance(module, QuantEmbedding):
        return _EmbeddingStandIn(name, module.quantized.shape[1])
    if type(module) is nn.Embedding and module.max_norm is None:
        return _EmbeddingStandIn(name, module.embedding_dim)
    return None


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
