"""Embeddings that multiply the rows of their table by a constant, as Gemma's and BART's do, told from all others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quant.calibration import evaluation
from quant.errors import QuantError

_IDS_A_CALL = 512
# Products of several constants round more than once.
_TOLERANCE = 4 * torch.finfo(torch.float32).eps


def row_scale(embedding: nn.Embedding, name: str = "the embedding") -> float:
    """Return the constant by which an embedding multiplies the rows that it looks up: 1 for a plain one.

    A forward of its own is not read but called, on every id, with noise in the place of its table: what agrees
    to float rounding computes nothing else.

    Args:
        embedding: Of any subclass, on any device but meta.
        name: Of the embedding, for messages.

    Raises:
        QuantError: It computes something else: it adds, normalizes, drops, tells ids apart, or has parameters beside
            its table or none.
    """
    if embedding.max_norm is not None or dict(embedding.named_parameters()).keys() != {"weight"}:
        raise computes_more(name, embedding, nn.Embedding)
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    try:
        scale = _measured(embedding)
    except Exception as error:  # whatever a stranger's forward raises
        raise computes_more(name, embedding, nn.Embedding) from error
    if scale is None:
        raise computes_more(name, embedding, nn.Embedding)
    return scale


def computes_more(name: str, layer: nn.Module, plain: type[nn.Module]) -> QuantError:
    """Return the error of a layer that cannot be replaced by a packed one of a plain kind."""
    return QuantError(
        f"{name} ({type(layer).__name__}) computes more than an {plain.__name__} does",
        "exclude it, or for a tied weight leave `embedding_format` unset",
    )


def _measured(embedding: nn.Embedding) -> float | None:
    """Return the constant, or None where there is no one constant."""
    table = _noise(*embedding.weight.shape)
    # Copies on the CPU: nothing of the module changes, and an index out of range is an error that can be told.
    buffers = {name: buffer.to("cpu", copy=True) for name, buffer in embedding.named_buffers()}

    def rows(ids: Tensor) -> Tensor:
        found: Tensor = functional_call(embedding, {"weight": table, **buffers}, (ids,))
        return found

    ids = torch.arange(len(table), device="cpu")
    with torch.no_grad(), evaluation(embedding):
        scale: float = rows(ids[None, :1])[0, 0, 0].item()
        for training, some in _calls(ids):
            embedding.train(training)
            if not _agree(rows(some), table[some] * scale):
                return None
    return scale


def _noise(rows: int, width: int) -> Tensor:
    """Return a table of which no two rows are alike and the first entry is 1.

    Each row is the one before moved by a number, so that it takes no memory to speak of.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randn(rows + width - 1, generator=generator, device="cpu")
    numbers[0] = 1
    return numbers.unfold(0, width, 1)


def _calls(ids: Tensor) -> Iterator[tuple[bool, Tensor]]:
    """Yield every id in evaluation mode, and some in another shape and in training mode."""
    for some in ids.split(_IDS_A_CALL):
        yield False, some[None]
    yield False, ids[:_IDS_A_CALL, None]
    yield True, ids[None, :_IDS_A_CALL]


def _agree(found: Tensor, wanted: Tensor) -> bool:
    near = (found - wanted).abs() <= _TOLERANCE * wanted.abs()
    return found.dtype == wanted.dtype and bool(near.all())
