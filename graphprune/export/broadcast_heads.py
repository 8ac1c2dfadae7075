"""One key head that is broadcast to all queries, said as grouping, which is how ONNX's Attention has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@contextmanager
def grouped_heads() -> Iterator[None]:
    """While a model is traced, let attention group its queries where it would broadcast a single key head to them."""
    with _Grouping():
        yield


class _Grouping(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention and _broadcasts(*args, **named):
            named["enable_gqa"] = True
        return func(*args, **named)


def _broadcasts(query: Tensor, key: Tensor, *others: object, **settings: object) -> bool:
    four = query.dim() == 4 and key.dim() == 4
    return four and key.shape[1] == 1 and query.shape[1] != 1
