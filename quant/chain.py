"""A model's chain of blocks, each of which gets the output of the one before; found by running the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration import Batch, call


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """How a block is called; the hidden state comes first, or by name.

    Attributes:
        arguments: Positional arguments behind the hidden state.
        keywords: Keyword arguments but for the hidden state.
        hidden_name: Name of the hidden state; None where it comes first.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    hidden_name: str | None

    def run(self, block: nn.Module, hidden: Tensor, gradients: bool = False) -> Tensor:
        """Call a block with a hidden state, and return the one that it puts out."""
        # A copy each time, since a cache among the arguments would grow with every call.
        arguments, keywords = copy.deepcopy((self.arguments, self.keywords))
        with torch.set_grad_enabled(gradients):
            if self.hidden_name is None:
                return _first(block(hidden, *arguments, **keywords))
            return _first(block(*arguments, **{**keywords, self.hidden_name: hidden}))


def run_block(block: nn.Module, calls: Sequence[BlockCall], hidden: Sequence[Tensor]) -> list[Tensor]:
    """Return what a block puts out for each hidden state, each by its own call."""
    return [each.run(block, state) for each, state in zip(calls, hidden, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Blocks in order, and how they are called.

    Attributes:
        name: Qualified name of the `nn.ModuleList` that holds them.
        blocks: In the order in which they run.
        hidden: What the first block gets, a tensor for each batch.
        calls: For each block a call for each batch.
    """

    name: str
    blocks: Sequence[nn.Module]
    hidden: list[Tensor]
    calls: list[list[BlockCall]]

    def holds(self, layer: str) -> bool:
        """Tell whether the layer of this qualified name is inside one of the blocks."""
        return _is_inside(layer, self.name)


def find_chain(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> Chain | None:
    """Return the chain of blocks that hold most of the named layers, or None if there is none.

    A candidate is an `nn.ModuleList`. Whether each of its blocks runs once and gets what the one before put out
    is seen on every batch, not assumed.

    Args:
        model: In evaluation mode.
        batches: At least one.
        names: Of the layers that matter.
    """
    candidates = [
        (sum(_is_inside(layer, name) for layer in names), name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    for count, name, blocks in sorted(candidates, key=lambda candidate: -candidate[0]):
        runs = [_chained_calls(model, batch, blocks) for batch in batches] if count else []
        found = [run for run in runs if run is not None]
        if found and len(found) == len(runs):
            calls = [[calls[block] for _, calls in found] for block in range(len(blocks))]
            return Chain(name, blocks, [hidden for hidden, _ in found], calls)
    return None


def _is_inside(layer: str, blocks: str) -> bool:
    """Tell whether a layer is part of a block; a block that is itself a layer holds none."""
    return layer.startswith(f"{blocks}.") and "." in layer.removeprefix(f"{blocks}.")


def _chained_calls(
    model: nn.Module, batch: Batch, blocks: Sequence[nn.Module]
) -> tuple[Tensor, list[BlockCall]] | None:
    """Return what the first block gets and how each is called, or None where they are no chain."""
    seen: list[tuple[nn.Module, Tensor | None, BlockCall, Any]] = []

    def after(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        seen.append((module, *_split(arguments, keywords), _first(output)))

    handles = [block.register_forward_hook(after, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if [module for module, *_ in seen] != list(blocks):
        return None
    inputs, outputs = [hidden for _, hidden, *_ in seen], [output for *_, output in seen]
    if inputs[0] is None or any(
        after is not before for before, after in zip(outputs, inputs[1:], strict=False)
    ):
        return None
    return inputs[0], [block_call for _, _, block_call, _ in seen]


def _split(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor | None, BlockCall]:
    """Return the hidden state, which is the first floating-point argument, and the rest of a call."""
    if arguments and _is_hidden(arguments[0]):
        return arguments[0], BlockCall(arguments[1:], keywords, None)
    for name, value in keywords.items():
        if _is_hidden(value):
            rest = {key: other for key, other in keywords.items() if key != name}
            return value, BlockCall(arguments, rest, name)
    return None, BlockCall(arguments, keywords, None)


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output
