"""Whether an exported file computes what the model computes, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from graphprune.errors import SourceError, VerificationError
from graphprune.export.agreement import Agreement, measure_agreement
from graphprune.export.check import Check, raise_if_failed
from graphprune.export.halves import in_float32
from graphprune.export.runtime import Array, OnnxDecoder
from graphprune.export.stand_ins import replaced
from graphprune.export.verify_decoder import (
    compare_greedy,
    compare_shapes,
    compare_shared_cache,
    compare_texts,
    exact_decoder,
    shares_cache,
)
from graphprune.export.verify_file import check_file
from graphprune.export.verify_weights import WEIGHT_TOLERANCE, compare_weights

TOLERANCE = 1e-4

PROMPT = 8
WRITTEN = 12

_OTHER_BOUNDS = {"weights": WEIGHT_TOLERANCE, "weight_rounding": None, "greedy_agreement": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a verification measured.

    Attributes:
        max_abs_error: Largest difference of a logit between the file and the model, both as they are.
        top1_agreement: Share of tokens for which the file as it is and torch rank the same token first.
        kl: Mean Kullback-Leibler divergence of the file as it is from torch, in nats a token.
        tokens: Tokens over which the three were taken.
        checks: The largest error of each single check; and `greedy_agreement`, the share of the tokens that the file
            as it is writes which torch would write too.
        tolerance: Bound of every check that `bound_of` does not give another.
    """

    max_abs_error: float
    top1_agreement: float
    kl: float
    tokens: int
    checks: dict[str, float]
    tolerance: float

    @property
    def rows(self) -> list[Check]:
        """All numbers with their bounds."""
        return [
            *(Check(name, error, bound_of(name, self.tolerance)) for name, error in self.checks.items()),
            *Agreement(self.max_abs_error, self.top1_agreement, self.kl, self.tokens).checks,
        ]

    @property
    def max_relative_error(self) -> float:
        """The worst of all checks with exact activations, over the largest logit."""
        return float(np.max([error for name, error in self.checks.items() if name not in _OTHER_BOUNDS]))

    @property
    def ok(self) -> bool:
        """Whether all numbers are within their bounds."""
        return all(row.holds is not False for row in self.rows)


def bound_of(check: str, tolerance: float = TOLERANCE) -> float | None:
    """Return the largest error that passes a check of `Verification.checks`; None where it is only told."""
    return _OTHER_BOUNDS.get(check, tolerance)


def verify_onnx(
    path: Path, model: nn.Module, token_windows: Sequence[Sequence[int]], *, tolerance: float = TOLERANCE
) -> Verification:
    """Compare an exported file with its model, as `measure_onnx` does, and raise if a number is out of bounds.

    Raises:
        VerificationError: If the file is not what the model is, or if there is nothing to compare.
    """
    found = measure_onnx(path, model, token_windows, tolerance=tolerance)
    raise_if_failed(str(path), found.rows)
    return found


def measure_onnx(
    path: Path, model: nn.Module, token_windows: Sequence[Sequence[int]], *, tolerance: float = TOLERANCE
) -> Verification:
    """Compare an exported file with its model, on the CPU.

    1. The file is a valid model, its shapes agree, and its data is where and as long as it says.
    2. Its quantized weights are the model's, or for a `byte_table` the model's with rounded levels.
    3. With exact activations it computes what torch computes with those weights: whole texts, a padded batch,
       token by token from its cache (a shared one in place too), several shapes after several lengths of the past;
       and it writes greedily what torch writes (two tokens as good as each other, within the bound, are the same).
       The bound is `tolerance`.
    4. As it is, against the model as it is: rounded levels, and activations rounded to int8 in quantized products.
       That error depends on the outliers of the model and has no sharp bound: `agreement.LEAST_TOP1` of the tokens
       must agree, within `agreement.LARGEST_KL` nats a token.

    Args:
        path: The file that `export_onnx` wrote.
        model: The model that it was written from, computed in float32; on return it is as it was.
        token_windows: Texts as token ids, two or more, of two tokens or more. All are used for 4, the first
            two for 3.
        tolerance: Largest difference of a logit with exact activations, over the largest logit.

    Returns:
        The numbers, be they within their bounds or not.

    Raises:
        VerificationError: If the file is broken, or if there is nothing to compare.
    """
    windows = [list(window) for window in token_windows]
    if len(windows) < 2 or min(map(len, windows)) < 2:
        raise VerificationError(
            f"{len(windows)} texts are too little to verify {path.name} with",
            "give at least two texts of two tokens or more",
        )
    check_file(path)
    checks, rounded = compare_weights(path, model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), in_float32(model):
            with replaced(model, rounded):
                checks |= _compare_exactly(path, model, windows)
            shipped, greedy_agreement = _compare_shipped(path, model, windows)
    except SourceError as error:
        raise VerificationError(error.problem, "export it again") from error
    finally:
        model.train(training)
    checks["greedy_agreement"] = greedy_agreement
    return Verification(
        max_abs_error=shipped.max_abs_error,
        top1_agreement=shipped.top1_agreement,
        kl=shipped.kl,
        tokens=shipped.tokens,
        checks=checks,
        tolerance=tolerance,
    )


def _compare_exactly(path: Path, model: nn.Module, windows: list[list[int]]) -> dict[str, float]:
    """Return relative errors of the file with exact activations."""
    decoder, shared = exact_decoder(path), shares_cache(path)

    def reference(tokens: list[int]) -> Array:
        return _torch_logits(model, tokens)

    return {
        **compare_texts(decoder, reference, windows),
        **({"shared_cache": compare_shared_cache(decoder, reference, windows[0])} if shared else {}),
        **compare_shapes(decoder, reference, windows[:2], batches_continue=not shared),
        "greedy": compare_greedy(decoder, reference, windows[0][:PROMPT], WRITTEN)[0],
    }


def _compare_shipped(path: Path, model: nn.Module, windows: list[list[int]]) -> tuple[Agreement, float]:
    """Return how far the file as it is agrees with torch, and on what share of the tokens that it writes."""
    decoder = OnnxDecoder(path)
    found = measure_agreement(
        decoder.logits,
        lambda ids: _torch_logits(model, ids[0].tolist())[None],
        [np.array([window], dtype=np.int64) for window in windows],
    )
    same = compare_greedy(decoder, lambda text: _torch_logits(model, text), windows[0][:PROMPT], WRITTEN)[1]
    return found, same


def _torch_logits(model: nn.Module, tokens: list[int]) -> Array:
    return model(input_ids=torch.tensor([tokens])).logits[0].float().numpy()
