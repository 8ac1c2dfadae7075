"""The tensors within what a model takes or returns, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

ONLY_OUTPUT = "output"
"""What the result of a model is called that names none; a second one is `output_1`."""


def named_tensors(item: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with names: keys and fields as they are, what lies within these after a dot, the rest by number.

    Args:
        item: A tensor, or mappings, data classes, tuples and lists of such.
        name: Of the item; empty for all that a model returns.
    """
    if isinstance(item, Tensor):
        yield name or ONLY_OUTPUT, item
    elif isinstance(item, Mapping) or is_dataclass(item) or hasattr(item, "_fields"):
        for key, part in _parts(item):
            yield from named_tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(item, (tuple, list)):
        for index, part in enumerate(item):
            first = f"{ONLY_OUTPUT}_{index}" if index else ONLY_OUTPUT
            yield from named_tensors(part, f"{name}.{index}" if name else first)


def _parts(item: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(item, Mapping):
        return item.items()
    names = getattr(item, "_fields", None) or [field.name for field in fields(item)]
    return [(key, getattr(item, key)) for key in names]
