"""A model's chain of blocks, each of which gets what the one before puts out; found by running the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TraceError
from graphprune.trace.caches import without_caches

See = Callable[[int, Tensor, Tensor], None]
"""Told a block's number, its input and its output."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockChain:
    """Blocks that a model runs one after the other, each on the output of the one before.

    Attributes:
        name: Qualified name of the `nn.ModuleList` that holds them.
        blocks: In the order in which they run, which is that of the list.
    """

    name: str
    blocks: tuple[nn.Module, ...]

    def parameters(self) -> tuple[int, ...]:
        """Return how many parameters each block holds."""
        return tuple(sum(weight.numel() for weight in block.parameters()) for block in self.blocks)


def find_blocks(model: nn.Module, inputs: Mapping[str, Any]) -> BlockChain:
    """Return the chain that holds the most parameters.

    A chain is an `nn.ModuleList` whose entries run once each, in order, the first floating-point argument of each
    being what the one before put out, and of the shape of its own output. All of it is seen, nothing looked up.

    Args:
        model: Any module.
        inputs: Keyword arguments of its forward.

    Raises:
        TraceError: If there is none.
    """
    lists = [
        BlockChain(name, tuple(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    calls: list[tuple[nn.Module, Tensor | None, Any]] = []

    def seen(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        calls.append((module, _hidden(arguments, keywords), _result(output)))

    with ExitStack() as hooks:
        for block in {id(block): block for chain in lists for block in chain.blocks}.values():
            hooks.enter_context(_removing(block.register_forward_hook(seen, with_kwargs=True)))
        run(model, inputs)
    chains = [chain for chain in lists if _is_chain(chain, calls)]
    if not chains:
        raise TraceError(
            f"{type(model).__name__} has no nn.ModuleList whose entries run one after the other, each on the output "
            "of the one before",
            "remove units of groups instead of whole blocks",
        )
    return max(chains, key=lambda chain: sum(chain.parameters()))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Return what a model puts out in evaluation mode, without gradients and without a key-value cache."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), without_caches(model):
            return model(**inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def watching(chain: BlockChain, see: See) -> Iterator[None]:
    """Show the input and the output of every block to `see` while the block of code runs."""

    def hook(number: int) -> Callable[..., None]:
        def after(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            hidden = _hidden(arguments, keywords)
            if hidden is not None:
                see(number, hidden, _result(output))

        return after

    with ExitStack() as hooks:
        for number, block in enumerate(chain.blocks):
            hooks.enter_context(_removing(block.register_forward_hook(hook(number), with_kwargs=True)))
        yield


@contextmanager
def skipping(chain: BlockChain, numbers: Iterable[int]) -> Iterator[None]:
    """Let some blocks of a chain put out what they get: their contributions to the residual stream are left out."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        hidden = _hidden(arguments, keywords)
        return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden

    with ExitStack() as hooks:
        for number in numbers:
            hooks.enter_context(_removing(chain.blocks[number].register_forward_hook(hook, with_kwargs=True)))
        yield


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _is_chain(chain: BlockChain, calls: list[tuple[nn.Module, Tensor | None, Any]]) -> bool:
    members = set(chain.blocks)
    own = [call for call in calls if call[0] in members]
    if [module for module, *_ in own] != list(chain.blocks):
        return False
    if any(hidden is None or _shape(output) != hidden.shape for _, hidden, output in own):
        return False
    return all(before[2] is after[1] for before, after in pairwise(own))


def _shape(output: Any) -> torch.Size | None:
    return output.shape if isinstance(output, Tensor) else None


def _hidden(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden state of a call: its first floating-point argument."""
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    return None


def _result(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output
