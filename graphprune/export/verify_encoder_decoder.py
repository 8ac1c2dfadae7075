"""Whether an exported encoder-decoder computes what the model computes, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from graphprune.errors import SourceError, VerificationError
from graphprune.export.agreement import Agreement, measure_agreement
from graphprune.export.check import raise_if_failed
from graphprune.export.encoder_decoder import encoded, encoder_inputs, has_halves
from graphprune.export.encoder_decoder_runtime import MASK, OnnxEncoderDecoder
from graphprune.export.filenames import DECODER_FILE, ENCODER_FILE
from graphprune.export.halves import in_float32, widened
from graphprune.export.named_tensors import named_tensors
from graphprune.export.runtime import Array, Integers, OnnxDecoder
from graphprune.export.stand_ins import replaced
from graphprune.export.verify import TOLERANCE, WRITTEN, Verification
from graphprune.export.verify_decoder import PADDINGS, PASTS, SEQUENCE, compare_greedy
from graphprune.export.verify_file import check_file
from graphprune.export.verify_outputs import check_inputs, compare_sizes, largest_error
from graphprune.export.verify_weights import compare_weights

_FILES = (ENCODER_FILE, DECODER_FILE)
_ROWS = len(PADDINGS)

_Inputs = dict[str, Any]


def verify_encoder_decoder(
    folder: Path,
    model: nn.Module,
    examples: Any,
    token_windows: Sequence[Sequence[int]],
    *,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compare an exported pair with its model, as `measure_encoder_decoder` does, and raise if it is out of bounds.

    Raises:
        VerificationError: If the files are not what the model is, or if there is nothing to compare.
    """
    found = measure_encoder_decoder(folder, model, examples, token_windows, tolerance=tolerance)
    raise_if_failed(str(folder), found.rows)
    return found


def measure_encoder_decoder(
    folder: Path,
    model: nn.Module,
    examples: Any,
    token_windows: Sequence[Sequence[int]],
    *,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compare an exported pair of encoder and decoder with its model, on the CPU.

    1. Both files are valid models, and their quantized weights are the model's, as `measure_onnx` checks it.
    2. With exact activations both compute what torch computes with those weights. `encoder`: its last hidden state,
       and keys and values of every layer, at the sizes that `measure_outputs` tries. Then logits: `prefill`, whole
       texts; `decode`, token by token from the cache; `padded_batch`, for inputs of which rows are padded, where there
       is a mask; several shapes after several lengths of the past (`3x12 after 7`); `greedy`, how far, by torch, a
       token that the files write is behind torch's own choice. The bound is `tolerance`.
    3. As they are, against the model as it is: bounds as those of `measure_onnx`.

    Args:
        folder: What `export_onnx` returned.
        model: The model that it was written from, computed in float32; on return it is as it was.
        examples: Inputs of the encoder like those that it was exported with; better real ones, of several rows.
        token_windows: Texts as the decoder is given them: token ids, two texts or more, of two tokens or more, the
            first of them its start token. They are cut to the shortest; the first goes with the examples' first
            row, and so on, round and round.
        tolerance: Largest difference of a number with exact activations, over the largest number.

    Returns:
        The numbers, be they within their bounds or not.

    Raises:
        VerificationError: If a file is broken, or if there is nothing to compare or no such model.
    """
    if not has_halves(model, examples):
        raise VerificationError(
            f"a {type(model).__name__} with these examples is not written as an encoder and a decoder",
            "give the model that the folder was written from, and inputs of its encoder alone",
        )
    ids = _texts(folder, token_windows)
    checks, rounded = _compare_weights(folder, model)
    inputs = widened(encoder_inputs(model, examples))
    training = model.training
    model.eval()
    try:
        check_inputs(folder / ENCODER_FILE, inputs)
        with torch.no_grad(), in_float32(model):
            with replaced(model, rounded):
                checks |= _compare_exactly(folder, model, inputs, ids)
            shipped, greedy_agreement = _compare_shipped(folder, model, inputs, ids)
    except SourceError as error:
        raise VerificationError(error.problem, "export it again") from error
    finally:
        model.train(training)
    return Verification(
        max_abs_error=shipped.max_abs_error,
        top1_agreement=shipped.top1_agreement,
        kl=shipped.kl,
        tokens=shipped.tokens,
        checks={**checks, "greedy_agreement": greedy_agreement},
        tolerance=tolerance,
    )


def _texts(folder: Path, windows: Sequence[Sequence[int]]) -> Integers:
    """Return the texts (texts, tokens), cut to the shortest."""
    length = min(map(len, windows), default=0)
    if len(windows) < 2 or length < 2:
        raise VerificationError(
            f"{len(windows)} texts are too little to verify {folder} with",
            "give at least two texts of two tokens or more",
        )
    return np.array([list(window)[:length] for window in windows], dtype=np.int64)


def _compare_weights(folder: Path, model: nn.Module) -> tuple[dict[str, float], dict[str, nn.Module]]:
    checks: dict[str, float] = {}
    rounded: dict[str, nn.Module] = {}
    for file in _FILES:
        check_file(folder / file)
        errors, modules = compare_weights(folder / file, model)
        # numpy's maximum is nan if any number is; Python's is not.
        checks |= {name: float(np.maximum(error, checks.get(name, 0.0))) for name, error in errors.items()}
        rounded |= modules
    return checks, rounded


def _compare_exactly(folder: Path, model: nn.Module, inputs: _Inputs, ids: Integers) -> dict[str, float]:
    """Return relative errors of the files with exact activations."""
    pair = OnnxEncoderDecoder(folder, exact=True)

    def encoder(given: _Inputs) -> list[Any]:
        return [tensor.numpy() for tensor in encoded(model, given)]

    inputs, ids = _rows(inputs, _ROWS), np.resize(ids, (_ROWS, ids.shape[1]))
    logits = _torch_logits(model, inputs, ids)
    decoder = _encode(pair, inputs)
    errors = {
        "encoder": float(np.max([*compare_sizes(pair.encoder, encoder, inputs, {}).values()])),
        "prefill": _error(decoder.logits(ids), logits),
        "decode": _error(_token_by_token(decoder, ids), logits),
    }
    if MASK in inputs:
        padded = _padded(inputs)
        expected = _torch_logits(model, padded, ids)
        errors["padded_batch"] = _error(_token_by_token(_encode(pair, padded), ids), expected)
    for batch in (1, _ROWS):
        decoder = _encode(pair, _rows(inputs, batch))
        errors |= _compare_shapes(decoder, ids[:batch], logits[:batch])
    return {**errors, "greedy": _compare_greedy(pair, model, inputs, ids)[0]}


def _compare_shipped(
    folder: Path, model: nn.Module, inputs: _Inputs, ids: Integers
) -> tuple[Agreement, float]:
    """Return how far the files as they are agree with torch, and on what share of the tokens that they write."""
    pair = OnnxEncoderDecoder(folder)
    rows = _rows(inputs, len(ids))
    found = measure_agreement(
        _encode(pair, rows).logits, lambda text: _torch_logits(model, rows, text), [ids]
    )
    return found, _compare_greedy(pair, model, inputs, ids)[1]


def _compare_shapes(decoder: OnnxDecoder, ids: Integers, logits: Array) -> dict[str, float]:
    """Return the errors of 1 and of n new tokens after 0, 1 and 7 earlier ones."""
    batch, total = len(ids), min(PASTS[-1] + SEQUENCE, ids.shape[1])
    pasts = [past for past in PASTS if past < total]
    errors = {}
    for past, new in product(pasts, dict.fromkeys((1, total - pasts[-1]))):
        cache = decoder.step(ids[:, :past])[1] if past else None
        found = decoder.logits(ids[:, past : past + new], past=cache)
        errors[f"{batch}x{new} after {past}"] = _error(found, logits[:, past : past + new])
    return errors


def _compare_greedy(
    pair: OnnxEncoderDecoder, model: nn.Module, inputs: _Inputs, ids: Integers
) -> tuple[float, float]:
    first = _rows(inputs, 1)

    def reference(tokens: list[int]) -> Array:
        return _torch_logits(model, first, np.array([tokens], dtype=np.int64))[0]

    return compare_greedy(_encode(pair, first), reference, ids[0, :1].tolist(), WRITTEN)


def _error(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        raise VerificationError(
            f"the logits have the shape {found.shape}, and should have {expected.shape}", "export it again"
        )
    return largest_error(found, expected)


def _token_by_token(decoder: OnnxDecoder, ids: Integers) -> Array:
    parts, past = [], None
    for place in range(ids.shape[1]):
        logits, past = decoder.step(ids[:, place : place + 1], past=past)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def _encode(pair: OnnxEncoderDecoder, inputs: _Inputs) -> OnnxDecoder:
    return pair.encode({name: tensor.numpy() for name, tensor in named_tensors(inputs)})


def _torch_logits(model: nn.Module, inputs: _Inputs, ids: Integers) -> Array:
    output = model(**inputs, decoder_input_ids=torch.from_numpy(ids), use_cache=False)
    return output.logits.float().numpy()


def _rows(inputs: _Inputs, count: int) -> _Inputs:
    """Return so many rows, the first ones or all of them round and round."""
    return tree_map(
        lambda item: item[torch.arange(count) % len(item)] if isinstance(item, Tensor) else item, inputs
    )


def _padded(inputs: _Inputs) -> _Inputs:
    """Return inputs of which each row ends in another number of masked tokens, all the same as its first one."""
    mask = inputs[MASK]
    kept = (mask.shape[1] - torch.tensor(PADDINGS)).clamp(min=1)
    real = torch.arange(mask.shape[1]) < kept[:, None]

    def cut(item: Any) -> Any:
        if not isinstance(item, Tensor) or item.shape[:2] != mask.shape:
            return item
        return torch.where(real.view(*real.shape, *[1] * (item.dim() - 2)), item, item[:, :1])

    return {**tree_map(cut, inputs), MASK: mask * real}
