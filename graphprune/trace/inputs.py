"""Example inputs: as keyword arguments of a model's forward, where the model is, with the sizes that stay open."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._pytree import tree_map

from graphprune.errors import TraceError

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def keyword_inputs(model: nn.Module, given: Any) -> dict[str, Any]:
    """Return example inputs as keyword arguments, on the meta device if the model is there.

    Args:
        model: The model that takes them.
        given: Keyword arguments by name; or one tensor, or a tuple of the first arguments in order.

    Raises:
        TraceError: If they are none of these, or its forward does not take them.
    """
    if isinstance(given, Tensor):
        given = (given,)
    if isinstance(given, (tuple, list)):
        given = _by_name(model, given)
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TraceError(
            f"example inputs are keyword arguments by name, not a {type(given).__name__}", wanted(model)
        )
    try:
        inspect.signature(model.forward).bind(**given)
    except TypeError as error:
        raise TraceError(
            f"{type(model).__name__} cannot be called with these example inputs: {error}", wanted(model)
        ) from None
    return on_device_of(model, dict(given))


def on_device_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Put the inputs on the meta device if the model is there."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "meta":
        return inputs
    return tree_map(lambda item: item.to("meta") if isinstance(item, Tensor) else item, inputs)


def open_sizes(inputs: dict[str, Any]) -> Any:
    """Leave the batch open, and the sequence of whatever has one: token numbers and (batch, sequence, width)."""

    def sizes(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return None
        has_sequence = item.dim() > 1 and (not item.is_floating_point() or item.dim() == 3)
        return dict.fromkeys(range(2 if has_sequence else min(1, item.dim())), Dim.AUTO)

    return tree_map(sizes, inputs)


def fixed_sizes(program: ExportedProgram) -> list[str]:
    """Return in words which batch, and which sequence of tokens, is as long as the example's only."""
    given = {
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    }
    fixed = []
    for node in program.graph.nodes:
        example = node.meta.get("val")
        if node.op == "placeholder" and node.name in given and isinstance(example, Tensor):
            axes = example.shape[:1] if example.is_floating_point() else example.shape[:2]
            fixed += [
                f"{node.name} axis {dim} is {size}"
                for dim, size in enumerate(axes)
                if not free_symbols(size) and size > 1
            ]
    return fixed


@contextmanager
def naming(model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Let a forward that takes some of the inputs as ``**kwargs`` name them: the exporter opens only named ones."""
    if not (set(inputs) - set(_named(model))):
        yield
        return
    own, unnamed_forward = vars(model).get("forward"), model.forward

    def forward(**named: Any) -> Any:
        return unnamed_forward(**named)

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    )
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def unnamed(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Return the inputs that a forward does not name: it takes them as ``**kwargs``, and may ignore them."""
    named = _named(model)
    return [name for name in inputs if named and name not in named]


def wanted(model: nn.Module) -> str:
    """Return what a model's example inputs are to be, with the first names of its forward."""
    named = _named(model)
    listed = ", ".join(named[:8]) + (", …" if len(named) > 8 else "")
    taken = f"; its forward takes {listed}" if named else ""
    example = named[0] if named else "input_ids"
    return f"give the keyword arguments of its forward: {{{example!r}: ...}}{taken}"


def _by_name(model: nn.Module, values: tuple[Any, ...] | list[Any]) -> dict[str, Any]:
    named = _named(model)
    if len(values) > len(named):
        problem = (
            f"{len(values)} example inputs are given, and {type(model).__name__}'s forward names {len(named)}"
        )
        raise TraceError(problem, wanted(model))
    return dict(zip(named, values))


def _named(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in _NAMED]
