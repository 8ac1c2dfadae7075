"""Whether an exported file computes what the model computes, in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune.errors import VerificationError
from graphprune.export.file_weights import file_weights
from graphprune.export.layouts import rounded_levels
from graphprune.export.runtime import OnnxDecoder
from graphprune.export.stand_ins import replaced
from quant import QuantEmbedding, QuantizedTensor, QuantLinear, get_format

Array = npt.NDArray[np.float32]

LEAST_TOP1 = 0.8
LARGEST_KL = 0.1
# A weight is one product of float32 numbers, in another order: a few units in the last place of absmax.
WEIGHT_TOLERANCE = 5e-7
TOLERANCE = 1e-4
_DECODED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a verification measured.

    Attributes:
        max_abs_error: Largest difference of a logit between the file and the model, both as they are.
        max_relative_error: The same with exact activations, over the largest logit; the worst of all checks.
        top1_agreement: Share of tokens for which the file as it is and torch rank the same token first.
        kl: Mean Kullback-Leibler divergence of the file as it is from torch, in nats a token.
        tokens: Tokens over which the two were taken.
        checks: The largest error of each single check.
        ok: Whether all are within their bounds.
    """

    max_abs_error: float
    max_relative_error: float
    top1_agreement: float
    kl: float
    tokens: int
    checks: dict[str, float]
    ok: bool


def verify_onnx(
    path: Path, model: nn.Module, token_windows: Sequence[Sequence[int]], *, tolerance: float = TOLERANCE
) -> Verification:
    """Compare an exported file with its model, on the CPU.

    1. The file is a valid model.
    2. Its quantized weights are the model's, or for a `byte_table` the model's with rounded levels.
    3. With exact activations it computes what torch computes with those weights: whole, in a padded batch,
       and token by token from its cache. The bound is `tolerance`.
    4. As it is, against the model as it is: rounded levels, and activations rounded to int8 in quantized products.
       That error depends on the outliers of the
       model and has no sharp bound: `LEAST_TOP1` of the tokens must agree, within `LARGEST_KL` nats a token.

    Args:
        path: The file that `export_onnx` wrote.
        model: The model that it was written from; on return it is as it was.
        token_windows: Texts as token ids, two or more, of two tokens or more. All are used for 4, the first
            two for 3.
        tolerance: Largest difference of a logit with exact activations, over the largest logit.

    Returns:
        The numbers.

    Raises:
        VerificationError: If the file is not what the model is, or if there is nothing to compare.
    """
    windows = [list(window) for window in token_windows]
    if len(windows) < 2 or min(map(len, windows)) < 2:
        raise VerificationError(
            f"{len(windows)} texts are too little to verify {path.name} with",
            "give at least two texts of two tokens or more",
        )
    _check_validity(path)
    checks, rounded = _compare_weights(path, model)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _session_errors(path):
            with replaced(model, rounded):
                checks |= _compare_exactly(path, model, windows)
            shipped = _compare_shipped(path, model, windows)
    finally:
        model.train(training)
    return _judge(path, checks, shipped, tolerance)


@contextmanager
def _session_errors(path: Path) -> Iterator[None]:
    """Turn ONNX Runtime's errors, which have no common base, into one of ours."""
    try:
        yield
    except Exception as err:
        if not type(err).__module__.startswith("onnxruntime"):
            raise
        reason = str(err).strip().split("\n")[0]
        raise VerificationError(f"{path} does not run: {reason}", "export it again") from err


def _check_validity(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        reason = str(err).strip().split("\n")[0]
        raise VerificationError(f"{path} is not a valid ONNX model: {reason}", "export it again") from err


def _compare_weights(path: Path, model: nn.Module) -> tuple[dict[str, float], dict[str, nn.Module]]:
    """Compare the file's packed weights with the model's; return also modules that hold rounded ones.

    The errors are relative to each weight's absmax.
    """
    modules = dict(_quantized_modules(model))
    errors: list[float] = []
    roundings: list[float] = []
    rounded: dict[str, nn.Module] = {}
    for name, found in file_weights(path):
        module = modules.get(name)
        if module is None or tuple(found.shape) != module.quantized.shape:
            raise VerificationError(
                f"{path} holds a {tuple(found.shape)} weight for {name}, which the model does not have",
                "verify with the very model that was exported",
            )
        weight = torch.from_numpy(found)
        exact = _relative_to_absmax(weight - module.quantized.dequantize(), module.quantized)
        roundings.append(exact)
        if exact <= WEIGHT_TOLERANCE:
            errors.append(exact)
        else:
            expected = _with_rounded_levels(module.quantized)
            errors.append(_relative_to_absmax(weight - expected, module.quantized))
            rounded[name] = _HeldWeight(weight, module)
    # numpy's maximum is nan if any number is; Python's is not.
    checks = {"weights": float(np.max(errors)), "weight_rounding": float(np.max(roundings))} if errors else {}
    return checks, rounded


def _compare_exactly(path: Path, model: nn.Module, windows: list[list[int]]) -> dict[str, float]:
    """Return relative errors of the file with exact activations: whole, in a padded batch, from its cache."""
    decoder = _exact_decoder(path)
    long, short = sorted(windows[:2], key=len, reverse=True)
    short = short[: max(1, min(len(short), len(long) - 1))]
    references = [_torch_logits(model, window) for window in (long, short)]
    largest = max(float(np.abs(reference).max()) for reference in references)

    padding = len(long) - len(short)
    ids = np.array([long, [short[0]] * padding + short], dtype=np.int64)
    mask = np.ones_like(ids)
    mask[1, :padding] = 0

    def error(logits: Array) -> float:
        rows = (logits[:1], logits[1:, padding:])
        differences = [np.abs(row - reference).max() for row, reference in zip(rows, references, strict=True)]
        return float(np.max(differences)) / largest

    return {
        "prefill": float(np.abs(decoder.logits(ids[:1]) - references[0]).max()) / largest,
        "padded_batch": error(decoder.logits(ids, mask)),
        "decode": error(_token_by_token(decoder, ids, mask)),
    }


@dataclass(frozen=True, slots=True)
class _Shipped:
    max_abs_error: float
    top1_agreement: float
    kl: float
    tokens: int


def _compare_shipped(path: Path, model: nn.Module, windows: list[list[int]]) -> _Shipped:
    decoder = OnnxDecoder(path)
    error, agreeing, divergence, tokens = 0.0, 0, 0.0, 0
    for window in windows:
        reference = torch.from_numpy(_torch_logits(model, window)[0]).double()
        found = torch.from_numpy(decoder.logits(np.array([window], dtype=np.int64))[0]).double()
        error = float(np.maximum(error, (reference - found).abs().max()))
        agreeing += int((reference.argmax(-1) == found.argmax(-1)).sum())
        log_p, log_q = reference.log_softmax(-1), found.log_softmax(-1)
        divergence += float(functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        tokens += len(window)
    return _Shipped(error, agreeing / tokens, divergence / tokens, tokens)


def _judge(path: Path, checks: dict[str, float], shipped: _Shipped, tolerance: float) -> Verification:
    bounds = dict.fromkeys(checks, tolerance) | {"weights": WEIGHT_TOLERANCE, "weight_rounding": 1.0}
    # Written so that nan fails.
    failed = [
        f"{name} {error:.3g} > {bounds[name]:.3g}"
        for name, error in checks.items()
        if not error <= bounds[name]
    ]
    if not shipped.top1_agreement >= LEAST_TOP1:
        failed.append(f"top-1 agreement {shipped.top1_agreement:.3f} < {LEAST_TOP1}")
    if not shipped.kl <= LARGEST_KL:
        failed.append(f"KL {shipped.kl:.3g} > {LARGEST_KL} nats")
    if failed:
        raise VerificationError(
            f"{path} differs from its model: {', '.join(failed)}",
            "do not use the file; export it again, and report this if it happens again",
        )
    return Verification(
        max_abs_error=shipped.max_abs_error,
        max_relative_error=max(error for name, error in checks.items() if bounds[name] == tolerance),
        top1_agreement=shipped.top1_agreement,
        kl=shipped.kl,
        tokens=shipped.tokens,
        checks=checks,
        ok=True,
    )


class _HeldWeight(nn.Module):
    """A quantized module with another dense weight in the place of its packed one."""

    weight: Tensor

    def __init__(self, weight: Tensor, original: QuantLinear | QuantEmbedding) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.original, QuantEmbedding):
            return functional.embedding(x, self.weight)
        y = functional.linear(x, self.weight, self.original.bias)
        if self.original.lora_A is None or self.original.lora_B is None:
            return y
        return y + self.original.scaling * (x @ self.original.lora_A.T) @ self.original.lora_B.T


def _quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantLinear | QuantEmbedding]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear | QuantEmbedding):
            yield name, module


def _with_rounded_levels(quantized: QuantizedTensor) -> Tensor:
    """Dequantize with the levels that an 8-bit grid has nearest to the format's own."""
    levels = torch.from_numpy(rounded_levels(get_format(quantized.format).levels.numpy()))
    return levels[quantized.unpacked_codes().long()] * _of_each(quantized, quantized.absmax)


def _relative_to_absmax(difference: Tensor, quantized: QuantizedTensor) -> float:
    """Return the largest difference over its block's absmax, in affine formats over absmax and offset together."""
    size = _of_each(quantized, quantized.absmax)
    if quantized.offsets is not None:
        size = size + _of_each(quantized, quantized.offsets.values().abs())
    return float((difference.abs() / size.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _of_each(quantized: QuantizedTensor, blocks: Tensor) -> Tensor:
    rows, columns = quantized.shape
    return blocks.repeat_interleave(quantized.block_size)[: rows * columns].view(rows, columns)


def _exact_decoder(path: Path) -> OnnxDecoder:
    """Open the file with every quantized product computed on float32 activations (a slow kernel)."""
    model = ir.load(path)
    for node in model.graph:
        node.attributes.pop("accuracy_level", None)
    exact = {"session.qdq_matmulnbits_accuracy_level": "0"}
    return OnnxDecoder(ir.to_proto(model).SerializeToString(), folder=path.parent, settings=exact)


def _torch_logits(model: nn.Module, window: list[int]) -> Array:
    return model(input_ids=torch.tensor([window])).logits.float().numpy()


def _token_by_token(decoder: OnnxDecoder, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Array:
    """Return the logits of a prefill followed by single steps over the last tokens."""
    length = ids.shape[1]
    prompt = max(1, length - _DECODED)
    logits, past = decoder.step(ids[:, :prompt], mask[:, :prompt])
    parts = [logits]
    for end in range(prompt + 1, length + 1):
        logits, past = decoder.step(ids[:, end - 1 : end], mask[:, :end], past)
        parts.append(logits)
    return np.concatenate(parts, axis=1)
