"""Whether a decoder computes the same logits however its texts are cut: whole, padded, from its cache.

Every number is the largest difference of a logit, over the largest logit of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphprune.errors import VerificationError
from graphprune.export.exact import EXACT, exact_graph
from graphprune.export.runtime import Array, Integers, OnnxDecoder, Past
from graphprune.export.shared_cache import has_shared_cache

Reference = Callable[[list[int]], Array]
"""From one text's tokens to its logits (tokens, vocabulary)."""

PASTS = (0, 1, 7)
SEQUENCE = 12
PADDINGS = (0, 2, 5)
"""Tokens of padding before each row of a batch."""

_DECODED = 4
_ROOM = 5
"""Tokens for which a shared cache has room and that do not come."""


def exact_decoder(path: Path) -> OnnxDecoder:
    """Open a file with every quantized product computed on float32 activations (a slow kernel)."""
    return OnnxDecoder(exact_graph(path), folder=path.parent, settings=EXACT)


def compare_texts(
    decoder: OnnxDecoder, reference: Reference, windows: Sequence[list[int]]
) -> dict[str, float]:
    """Return the errors over two whole texts: of one, of both as a padded batch, and of that token by token."""
    long, short = sorted(windows[:2], key=len, reverse=True)
    short = short[: max(1, min(len(short), len(long) - 1))]
    references = [reference(window) for window in (long, short)]
    ids, mask = _padded([long, short], [0, len(long) - len(short)], len(long))
    return {
        "prefill": _error(decoder.logits(ids[:1]), references[:1], 0),
        "padded_batch": _error(decoder.logits(ids, mask), references, 0),
        "decode": _error(_token_by_token(decoder, ids, mask), references, 0),
    }


def compare_shapes(
    decoder: OnnxDecoder,
    reference: Reference,
    windows: Sequence[list[int]],
    *,
    batches_continue: bool = True,
) -> dict[str, float]:
    """Return the error of 1 × 1, 1 × n and, padded, 3 × n new tokens after 0, 1 and 7 earlier ones.

    Args:
        decoder: The file.
        reference: What the logits should be.
        windows: Texts; no more tokens than the longest has are used at once.
        batches_continue: Whether the file can take several tokens of several texts after earlier ones.

    Returns:
        By names such as ``3x12 after 7``.

    Raises:
        VerificationError: If what comes out has another shape than the file declares.
    """
    total = min(PASTS[-1] + SEQUENCE, max(map(len, windows)))
    pasts = [past for past in PASTS if past < total]
    sequence = total - pasts[-1]
    tokens = np.array([token for window in windows for token in window], dtype=np.int64)
    texts = np.resize(tokens, (len(PADDINGS), total)).tolist()
    references = [reference(text) for text in texts]
    shapes = dict.fromkeys(((1, 1), (1, sequence), (len(PADDINGS), sequence)))
    errors = {}
    for (batch, new), past in product(shapes, pasts):
        if batch == 1 or new == 1 or past == 0 or batches_continue:
            # A prompt has a token of every text.
            paddings = [min(padding, (past or new) - 1) for padding in PADDINGS[:batch]]
            ids, mask = _padded(texts[:batch], paddings, past + new)
            cache = decoder.step(ids[:, :past], mask[:, :past])[1] if past else None
            logits, present = decoder.step(ids[:, past:], mask, cache)
            _check_shapes(decoder, logits, present, ids)
            errors[f"{batch}x{new} after {past}"] = _error(logits, references[:batch], past, paddings)
    return errors


def compare_shared_cache(decoder: OnnxDecoder, reference: Reference, text: list[int]) -> float:
    """Return the error of a text whose last tokens come one by one, in a cache that has room for more.

    Args:
        decoder: A file with a shared cache.
        reference: What the logits should be.
        text: Two tokens or more.
    """
    ids, prompt = np.array([text], dtype=np.int64), max(1, len(text) - _DECODED)
    mask = np.ones_like(ids)
    past = decoder.shared_past(1, len(text) + _ROOM)
    cuts = [0, *range(prompt, len(text) + 1)]
    logits = [decoder.step_in_place(ids[:, start:end], mask[:, :end], past) for start, end in pairwise(cuts)]
    return _error(np.concatenate(logits, axis=1), [reference(text)], 0)


def compare_greedy(
    decoder: OnnxDecoder, reference: Reference, prompt: list[int], new_tokens: int
) -> tuple[float, float]:
    """Let a file write greedily, and judge each of its tokens by the reference.

    Args:
        decoder: The file.
        reference: What the logits should be.
        prompt: Tokens, one or more.
        new_tokens: Tokens to write.

    Returns:
        How much smaller, by the reference, the logit of a token is than the greatest, over the largest of all: 0 if
        the reference would write the same text; and for how many of the tokens that is so.
    """
    written = decoder.greedy(prompt, new_tokens)
    logits = reference([*prompt, *written[:-1]])[len(prompt) - 1 :]
    behind = logits.max(axis=-1) - logits[np.arange(len(written)), written]
    return float(behind.max() / np.abs(logits).max()), float((behind == 0).mean())


def shares_cache(path: Path) -> bool:
    """Return whether a file's cache may be one buffer before and after.

    It is so with ONNX Runtime's GroupQueryAttention, which then takes several new tokens of one text alone after
    earlier ones; ONNX's own Attention takes them of several.
    """
    return has_shared_cache(ir.load(path).graph)


def _padded(texts: list[list[int]], paddings: list[int], length: int) -> tuple[Integers, Integers]:
    """Return ids and mask (texts, length), each text cut and padded on the left with its own first token."""
    rows = [
        [text[0]] * padding + text[: length - padding] for text, padding in zip(texts, paddings, strict=True)
    ]
    ids = np.array(rows, dtype=np.int64)
    return ids, (np.arange(length) >= np.array(paddings)[:, None]).astype(np.int64)


def _error(logits: Array, references: list[Array], past: int, paddings: Sequence[int] | None = None) -> float:
    """Compare logits (batch, new, vocabulary), the last of each text, with those of the texts alone."""
    end = past + logits.shape[1]
    if paddings is None:
        paddings = [end - len(reference) for reference in references]
    differences = []
    for row, reference, padding in zip(logits, references, paddings, strict=True):
        first = max(past, padding)
        differences.append(np.abs(row[first - past :] - reference[first - padding : end - padding]).max())
    # numpy's maximum is nan if any number is; Python's is not.
    return float(np.max(differences)) / max(float(np.abs(reference).max()) for reference in references)


def _check_shapes(decoder: OnnxDecoder, logits: Array, present: Past, ids: Integers) -> None:
    batch, tokens = ids.shape
    expected = [(batch, part.shape[1], tokens, part.shape[3]) for part in decoder.empty_past(batch)]
    found = [part.shape for part in present]
    if found != expected or logits.shape[0] != batch:
        raise VerificationError(
            f"{decoder.name}: the cache after {batch} texts of {tokens} tokens is {found}, and should be {expected}",
            "export it again",
        )


def _token_by_token(decoder: OnnxDecoder, ids: Integers, mask: Integers) -> Array:
    """Return the logits of a prefill followed by single steps over the last tokens."""
    length = ids.shape[1]
    prompt = max(1, length - _DECODED)
    logits, past = decoder.step(ids[:, :prompt], mask[:, :prompt])
    parts = [logits]
    for end in range(prompt + 1, length + 1):
        logits, past = decoder.step(ids[:, end - 1 : end], mask[:, :end], past)
        parts.append(logits)
    return np.concatenate(parts, axis=1)
