"""Arrays to run an ONNX file with: from text, from a file of the user's, or drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphprune.certify.onnx_session import OnnxSession
from graphprune.errors import SourceError
from graphprune.trace.graph import OperatorGraph

Arrays = dict[str, NDArray[Any]]

TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
PAST = "past_key_values."
_ROWS = 4
# Two to choose a ridge by, one to judge by.
_LEAST_BATCHES = 3
# Rows and tokens of random text, and how many of them go into the cache first. Of several texts not all operators
# take more tokens after those in a cache.
_TEXT = (1, 16)
_PAST_TOKENS = 3


def fed(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that a file has to be given."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def reads_text(model: ir.Model) -> bool:
    """Whether token ids, and what follows from them, are all that a file has to be given."""
    names = {str(value.name) for value in fed(model)}
    return "input_ids" in names and all(name in TEXT_INPUTS or name.startswith(PAST) for name in names)


def text_arrays(
    model: ir.Model, ids: NDArray[np.int64], cache: Mapping[str, NDArray[Any]] | None = None
) -> Arrays:
    """Return the inputs of a file that reads text.

    Args:
        model: The file.
        ids: (rows, window).
        cache: Keys and values of the tokens before them, by input; none by default.
    """
    rows, window = ids.shape
    past = next((array.shape[2] for array in (cache or {}).values()), 0)
    known = {
        "input_ids": ids,
        "attention_mask": np.ones((rows, past + window)),
        "position_ids": np.broadcast_to(np.arange(past, past + window), ids.shape),
        "token_type_ids": np.zeros_like(ids),
        **(cache or {}),
    }
    found: Arrays = {}
    for value in fed(model):
        name = str(value.name)
        sizes = [dim if isinstance(dim, int) else 0 for dim in (value.shape or ())[1:]]
        found[name] = (known[name] if name in known else np.zeros((rows, *sizes))).astype(_dtype(value))
    return found


def example_arrays(
    graph: OperatorGraph, model: ir.Model, seed: int, ids: NDArray[np.int64] | None = None
) -> Arrays:
    """Return inputs to try a model with, a cache as the model itself fills it among them.

    Args:
        graph: The graph that was traced; axes of what is no text have the sizes that they have there.
        model: The model to be run: the traced one, or what pruning made of it.
        seed: Of what is drawn at random: rows of a table that they index, normal numbers; all else are ones.
        ids: Tokens (1, window) of a model that reads text, drawn at random by default.
    """
    generator = np.random.default_rng(seed)
    if not reads_text(model):
        return _random_arrays(graph, model, generator)
    caches = [str(value.name) for value in fed(model) if str(value.name).startswith(PAST)]
    ids = _random_tokens(model, generator) if ids is None else ids
    past = min(_PAST_TOKENS, ids.shape[1] - 1)
    if not caches or not past:
        return text_arrays(model, ids)
    presents = [name.replace(PAST, "present.", 1) for name in caches]
    filled = OnnxSession(model).run(text_arrays(model, ids[:, :past]), presents)
    return text_arrays(model, ids[:, past:], dict(zip(caches, filled, strict=True)))


def _random_tokens(model: ir.Model, generator: np.random.Generator) -> NDArray[np.int64]:
    (value,) = (value for value in fed(model) if value.name == "input_ids")
    usual = zip(value.shape or (), _TEXT, strict=True)
    shape = [size if isinstance(size, int) else other for size, other in usual]
    return generator.integers(0, _rows_indexed(value) or 2, shape)


def _random_arrays(graph: OperatorGraph, model: ir.Model, generator: np.random.Generator) -> Arrays:
    sizes = {
        str(value.name): traced.shape for value, traced in zip(fed(graph.program), graph.inputs, strict=True)
    }
    found: Arrays = {}
    for value in fed(model):
        name, dtype = str(value.name), _dtype(value)
        dims = zip(value.shape or (), sizes[name], strict=True)
        shape = [dim if isinstance(dim, int) else size for dim, size in dims]
        rows = _rows_indexed(value)
        if np.issubdtype(dtype, np.floating):
            found[name] = generator.standard_normal(shape).astype(dtype)
        elif rows:
            found[name] = generator.integers(0, rows, shape).astype(dtype)
        else:
            found[name] = np.ones(shape, dtype)
    return found


def read_arrays(path: Path, model: ir.Model) -> list[Arrays]:
    """Read the batches of an .npz file: rows of each input, a few at a time.

    Raises:
        SourceError: If it cannot be read, or does not fit the model's inputs.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(
            f"cannot read the arrays in {path}: {error}", "write them with numpy.savez"
        ) from error
    wanted = {str(value.name): value for value in fed(model)}
    rows = {len(array) if array.ndim else 0 for array in arrays.values()}
    step = _fixed_rows(model) or max(1, min(_ROWS, min(rows, default=0) // _LEAST_BATCHES))
    if arrays.keys() != wanted.keys() or len(rows) != 1 or min(rows) < _LEAST_BATCHES * step:
        raise SourceError(
            f"{path} holds {', '.join(f'{name} {array.shape}' for name, array in arrays.items()) or 'nothing'}",
            f"give as many rows, {_LEAST_BATCHES * step} or more, of each of {', '.join(wanted)}",
        )
    for name, value in wanted.items():
        _check_fits(path, name, arrays[name], value)
        arrays[name] = arrays[name].astype(_dtype(value))
    return [
        {name: array[start : start + step] for name, array in arrays.items()}
        for start in range(0, min(rows) - step + 1, step)
    ]


def _fixed_rows(model: ir.Model) -> int | None:
    sizes = {value.shape[0] for value in fed(model) if value.shape}
    return next((size for size in sizes if isinstance(size, int)), None)


def _check_fits(path: Path, name: str, array: NDArray[Any], value: ir.Value) -> None:
    shape = value.shape or ()
    fits = len(shape) == array.ndim and all(
        size == dim for size, dim in zip(array.shape[1:], shape[1:]) if isinstance(dim, int)
    )
    same_kind = np.issubdtype(array.dtype, np.floating) == np.issubdtype(_dtype(value), np.floating)
    if not fits or not same_kind:
        raise SourceError(
            f"{path}: '{name}' is {array.dtype} {array.shape}, and the model reads {_dtype(value)} {value.shape}",
            "give arrays as the model reads them, rows first",
        )


def _rows_indexed(value: ir.Value) -> int:
    """Return how many rows the smallest table has that an input's numbers are indices of; 0 if there is none."""
    pending, found = [value], []
    while pending:
        for node, position in pending.pop().uses():
            if node.op_type in ("Cast", "Reshape", "Unsqueeze", "Identity") and position == 0:
                pending.append(node.outputs[0])
            elif node.op_type in ("Gather", "GatherBlockQuantized") and position == 1:
                table = node.inputs[0]
                size = table.shape[0] if table is not None and table.shape else None
                found += [size] if isinstance(size, int) else []
    return min(found, default=0)


def _dtype(value: ir.Value) -> np.dtype[Any]:
    if value.dtype is None:
        raise SourceError(f"the input '{value.name}' has no type", "export the model again")
    return np.dtype(value.dtype.numpy())
