"""Other functions in the place of torch's own, wherever a model calls them while the block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]


@contextmanager
def overridden(substitutes: Mapping[Function, Function]) -> Iterator[None]:
    """Call substitutes with what their functions are called with; a substitute that calls its function means torch's.

    Args:
        substitutes: By the function.
    """
    with _Mode(substitutes):
        yield


class _Mode(TorchFunctionMode):
    def __init__(self, substitutes: Mapping[Function, Function]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._substitutes.get(func, func)(*args, **(kwargs or {}))
