"""Any model as a function of flat, named tensors: inputs as its examples have them, outputs as it names them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from graphprune.errors import ExportError, TraceError
from graphprune.export.axes import DynamicAxes, checked_axes, guessed_axes, name_symbols, widened
from graphprune.export.named_tensors import named_tensors
from graphprune.export.traceable import Traceable
from graphprune.trace.caches import without_caches
from graphprune.trace.inputs import keyword_inputs


class FlatFunction(nn.Module):
    """Computes a list of tensors from a list of tensors.

    Args:
        model: Any module.
        inputs: Keyword arguments of its forward; what is no tensor in them is the same at every call.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Call the model with other tensors in the places of its example's."""
        output = self.model(**with_tensors(self._inputs, tensors))
        return [tensor for _, tensor in named_tensors(output)]


def traceable_function(model: nn.Module, examples: Any, dynamic_axes: DynamicAxes | None = None) -> Traceable:
    """Return a model as the tracer takes it.

    Args:
        model: Any module.
        examples: Its inputs, as `graphprune.trace` takes them.
        dynamic_axes: The free axes; None to find them by `guessed_axes`.

    Raises:
        ExportError: If the model does not take the examples, or gives no tensor.
    """
    try:
        inputs = keyword_inputs(model, examples)
    except TraceError as error:
        raise ExportError(error.problem, error.remedy) from error
    tensors = dict(named_tensors(inputs))
    free = guessed_axes(tensors) if dynamic_axes is None else checked_axes(tensors, dynamic_axes)
    tensors = widened(tensors, free)
    inputs = with_tensors(inputs, list(tensors.values()))
    return Traceable(
        module=FlatFunction(model, inputs),
        arguments=(list(tensors.values()),),
        dynamic_shapes=([dict.fromkeys(axes, Dim.AUTO) for axes in free.values()],),
        input_names=list(tensors),
        # A graph has one value of a name.
        output_names=[f"output_{name}" if name in tensors else name for name in _output_names(model, inputs)],
        name_axes=partial(name_symbols, free=free, required=dynamic_axes is not None),
        graph_name="model",
        remedy="run it on the same examples; branches that depend on the inputs' numbers are the usual cause",
        context=partial(without_caches, model),
    )


def with_tensors(inputs: Mapping[str, Any], tensors: list[Tensor]) -> dict[str, Any]:
    """Return keyword arguments with other tensors in their places, in the order of `named_tensors`."""
    rest = iter(tensors)
    return tree_map(lambda item: next(rest) if isinstance(item, Tensor) else item, dict(inputs))


def _output_names(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    with torch.no_grad(), without_caches(model):
        try:
            output = model(**inputs)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"the model does not run on the examples: {reason}", "give others") from error
    names = [name for name, _ in named_tensors(output)]
    if not names:
        raise ExportError(f"the model returns a {type(output).__name__} without tensors", "return tensors")
    return names
