"""Whether a file without a cache computes what its model computes, at several sizes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from graphprune.errors import SourceError, VerificationError
from graphprune.export.check import Check, raise_if_failed
from graphprune.export.exact import EXACT, exact_graph
from graphprune.export.function import with_tensors
from graphprune.export.halves import in_float32, widened
from graphprune.export.named_tensors import named_tensors
from graphprune.export.runtime import clear_errors, open_session
from graphprune.export.stand_ins import replaced
from graphprune.export.verify import TOLERANCE, bound_of
from graphprune.export.verify_file import check_file
from graphprune.export.verify_weights import compare_weights
from graphprune.trace.caches import without_caches
from graphprune.trace.inputs import keyword_inputs

LARGEST_SHIPPED = 0.1

_Array = npt.NDArray[Any]
_Arrays = dict[str, _Array]
_Sizes = dict[str, int]

Reference = Callable[[dict[str, Any]], list[_Array]]
"""From a model's inputs to its outputs."""


def verify_outputs(
    path: Path,
    model: nn.Module,
    examples: Any,
    *,
    sizes: Mapping[str, Sequence[int]] | None = None,
    tolerance: float = TOLERANCE,
) -> list[Check]:
    """Compare a file with its model, as `measure_outputs` does, and raise if a number is out of bounds.

    Raises:
        VerificationError: If the file is not what the model is, or the model does not take the sizes.
    """
    checks = measure_outputs(path, model, examples, sizes=sizes, tolerance=tolerance)
    raise_if_failed(str(path), checks)
    return checks


def measure_outputs(
    path: Path,
    model: nn.Module,
    examples: Any,
    *,
    sizes: Mapping[str, Sequence[int]] | None = None,
    tolerance: float = TOLERANCE,
) -> list[Check]:
    """Compare a file that `export_onnx` wrote from examples with its model, on the CPU.

    1. The file is a valid model, its shapes agree, and its data is where and as long as it says.
    2. Its quantized weights are the model's, or for a `byte_table` the model's with rounded levels (`weights`,
       `weight_rounding`).
    3. With exact activations every output is torch's, with those weights: of the examples, and of these cut or
       repeated to other sizes of every free axis (`batch_size 1, sequence_length 11`). The bound is `tolerance`.
    4. As it is, against the model as it is (`shipped`): the root mean square error over that of the output, at most
       `LARGEST_SHIPPED`.

    Args:
        path: The file.
        model: The model that it was written from, computed in float32; on return it is as it was.
        examples: Inputs like those that it was exported with; better real ones.
        sizes: To compare at, for each free axis by its name. By default 1 and the example's, of the first axis of an
            input 1 and one more than the example's.
        tolerance: Largest difference of an output, over its largest number.

    Returns:
        The numbers, be they within their bounds or not. Of integers and truth values it is the share that differs.

    Raises:
        VerificationError: If the file is broken, or has other outputs, or the model does not take the sizes.
    """
    check_file(path)
    checks, rounded = compare_weights(path, model)
    inputs = widened(keyword_inputs(model, examples))
    training = model.training
    model.eval()
    try:
        check_inputs(path, inputs)
        with torch.no_grad(), in_float32(model):
            with replaced(model, rounded):
                exact = open_session(exact_graph(path), folder=path.parent, settings=EXACT)
                checks |= compare_sizes(exact, partial(_reference, model), inputs, sizes or {})
            found = _run(open_session(path), inputs)
            shipped = _worst(found, _reference(model, inputs), _root_mean_square)
    except SourceError as error:
        raise VerificationError(error.problem, "export it again") from error
    finally:
        model.train(training)
    rows = [Check(name, error, bound_of(name, tolerance)) for name, error in checks.items()]
    return [*rows, Check("shipped", shipped, LARGEST_SHIPPED)]


def check_inputs(path: Path, inputs: dict[str, Any]) -> None:
    """Raise VerificationError unless a file takes these inputs."""
    wanted = [value.name for value in open_session(path).get_inputs()]
    given = [name for name, _ in named_tensors(inputs)]
    if sorted(wanted) != sorted(given):
        raise VerificationError(
            f"{path} takes the inputs {', '.join(wanted)}, the examples are {', '.join(given)}",
            "verify with examples like those that it was exported with",
        )


def compare_sizes(
    session: onnxruntime.InferenceSession,
    reference: Reference,
    inputs: dict[str, Any],
    asked: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Return the worst error of an output for inputs as they are and at other sizes, by the names of these.

    Args:
        session: Of the file.
        reference: What its outputs should be.
        inputs: By name.
        asked: Sizes of free axes, by name; what `measure_outputs` says for others.

    Raises:
        VerificationError: If the model does not take the sizes, or the file's outputs have other shapes.
    """
    errors = {"examples": _worst(_run(session, inputs), reference(inputs), largest_error)}
    axes = {
        value.name: {axis: size for axis, size in enumerate(value.shape) if isinstance(size, str)}
        for value in session.get_inputs()
    }
    for sizes in _combinations(axes, dict(named_tensors(inputs)), asked):
        tensors = [_resized(tensor, axes[name], sizes) for name, tensor in named_tensors(inputs)]
        resized = with_tensors(inputs, tensors)
        label = ", ".join(f"{name} {size}" for name, size in sizes.items())
        try:
            expected = reference(resized)
        except Exception as error:
            raise VerificationError(
                f"the model itself does not take {label}: {error}", "give sizes that it takes"
            ) from error
        errors[label] = _worst(_run(session, resized), expected, largest_error)
    return errors


def _combinations(
    axes: Mapping[str, Mapping[int, str]], tensors: Mapping[str, Tensor], asked: Mapping[str, Sequence[int]]
) -> Iterator[_Sizes]:
    """Yield each combination of sizes of all free axes."""
    tried: dict[str, Sequence[int]] = {}
    for name, free in axes.items():
        for axis, symbol in free.items():
            size = tensors[name].shape[axis]
            tried.setdefault(symbol, asked.get(symbol, (1, size if axis else size + 1)))
    if tried:
        for sizes in product(*tried.values()):
            yield dict(zip(tried, sizes, strict=True))


def _resized(tensor: Tensor, axes: Mapping[int, str], sizes: _Sizes) -> Tensor:
    """Cut a tensor, or repeat what it holds."""
    for axis, symbol in axes.items():
        places = torch.arange(sizes[symbol]) % tensor.shape[axis]
        tensor = tensor.index_select(axis, places)
    return tensor


def _reference(model: nn.Module, inputs: dict[str, Any]) -> list[_Array]:
    with without_caches(model):
        return [tensor.numpy() for _, tensor in named_tensors(model(**inputs))]


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> _Arrays:
    names = [value.name for value in session.get_outputs()]
    feeds = {name: tensor.numpy() for name, tensor in named_tensors(inputs)}
    with clear_errors("the file"):
        return dict(zip(names, session.run(names, feeds), strict=True))


def _worst(found: _Arrays, expected: Sequence[_Array], measure: Callable[[_Array, _Array], float]) -> float:
    """Return the largest error of an output.

    Raises:
        VerificationError: If there are other outputs than expected, or of other shapes.
    """
    shapes = [array.shape for array in found.values()], [array.shape for array in expected]
    if shapes[0] != shapes[1]:
        raise VerificationError(
            f"the file's outputs have the shapes {shapes[0]}, and should have {shapes[1]}", "export it again"
        )
    errors = [
        measure(array, reference) if reference.dtype.kind == "f" else float((array != reference).mean())
        for array, reference in zip(found.values(), expected, strict=True)
    ]
    # numpy's maximum is nan if any number is; Python's is not.
    return float(np.max(errors))


def largest_error(found: _Array, reference: _Array) -> float:
    """Return the largest difference of a number, over the largest number of the reference."""
    return float(np.abs(found - reference).max() / max(float(np.abs(reference).max()), _TINY))


def _root_mean_square(found: _Array, reference: _Array) -> float:
    error, size = (float(np.sqrt(np.square(array).mean())) for array in (found - reference, reference))
    return error / max(size, _TINY)


_TINY = float(np.finfo(np.float32).tiny)
