"""Whether a file agrees with itself, where there is no torch model to compare it with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphprune.errors import SourceError, VerificationError
from graphprune.export.check import Check
from graphprune.export.runtime import Array
from graphprune.export.verify_decoder import compare_shapes, compare_texts, exact_decoder, shares_cache
from graphprune.export.verify_file import check_file

_TEXTS = (24, 17)


def measure_alone(path: Path, *, tolerance: float) -> list[Check]:
    """Check a decoder's file without its torch model.

    With exact activations it must compute from its cache, in padded batches, and at several shapes after several
    lengths of the past what it computes of each text whole and alone. The texts are random tokens.

    Args:
        path: The file.
        tolerance: Largest difference of a logit, over the largest logit.

    Returns:
        The numbers, be they within their bounds or not; none for a model without a cache, which is only checked as
        a file.

    Raises:
        VerificationError: If the file is broken.
    """
    check_file(path)
    if not any(str(value.name).startswith("past_key_values.") for value in ir.load(path).graph.inputs):
        return []
    try:
        errors = _compare_with_itself(path)
    except SourceError as error:
        raise VerificationError(error.problem, "export it again") from error
    return [Check(name, error, tolerance) for name, error in errors.items()]


def _compare_with_itself(path: Path) -> dict[str, float]:
    decoder = exact_decoder(path)

    def reference(tokens: list[int]) -> Array:
        return decoder.logits(np.array([tokens], dtype=np.int64))[0]

    vocabulary = reference([0]).shape[-1]
    random = np.random.default_rng(0)
    texts = [random.integers(vocabulary, size=length).tolist() for length in _TEXTS]
    errors = compare_texts(decoder, reference, texts)
    del errors["prefill"]  # is the reference itself
    return errors | compare_shapes(decoder, reference, texts, batches_continue=not shares_cache(path))
