"""Whole blocks taken out: a stock model of the same class with fewer layers, or a copy with a shorter list."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from graphprune.errors import ShrinkError
from graphprune.shrink.weights import named_weights
from graphprune.source.model import example_inputs
from graphprune.trace.blocks import BlockChain, find_blocks, run, skipping
from graphprune.trace.inputs import keyword_inputs

# Relative to the largest output: both models run the same operators on the same numbers.
TOLERANCE = 1e-5


def drop_blocks(model: nn.Module, blocks: Collection[int], inputs: Any = None) -> nn.Module:
    """Return a model without some of its blocks: what they would add to the residual stream is left out.

    A transformers model is built anew by its own class, from a configuration with fewer layers: it saves, loads and
    generates like any other. Of another module the result is a copy whose list of blocks is shorter.

    Source: ShortGPT (arXiv 2403.03853).

    Args:
        model: Not changed.
        blocks: Numbers of the blocks to remove, from 0, in the order in which they run.
        inputs: Example inputs to find the blocks with, and to check the result on; a transformers model needs none.

    Returns:
        The smaller model: tied parameters stay tied, dtypes, devices, gradient flags and the mode stay as they were.

    Raises:
        TraceError: If the model has no chain of blocks.
        ShrinkError: If the numbers are not those of some of its blocks, its class does not build a model with fewer
            of them, or what the smaller model computes is something else.
    """
    transformers_model = _checked(model)
    if inputs is None and not transformers_model:
        raise ShrinkError(
            f"{type(model).__name__} needs example inputs", "give them: drop_blocks(model, blocks, inputs)"
        )
    given = keyword_inputs(model, example_inputs(model) if inputs is None else inputs)
    chain = find_blocks(model, given)
    kept = _kept(blocks, chain)
    small = _rebuilt(model, chain, kept) if transformers_model else _shortened(model, chain, kept)
    with skipping(chain, blocks):
        expected = _outputs(model, given)
    _compare(_outputs(small, given), expected, model)
    return small


def _checked(model: nn.Module) -> bool:
    """Return whether a model is one of transformers', after checking that it can be compared."""
    whole = isinstance(model, PreTrainedModel)
    if not whole and any(isinstance(module, PreTrainedModel) for module in model.modules()):
        raise ShrinkError(
            f"{type(model).__name__} wraps a transformers model, whose configuration would no longer describe it",
            "give the transformers model itself, adapters merged",
        )
    if any(weight.is_meta for _, weight in named_weights(model)):
        raise ShrinkError(f"{type(model).__name__} has no weights to compare on", "load them first")
    return whole


def _kept(blocks: Collection[int], chain: BlockChain) -> list[int]:
    count = len(chain.blocks)
    wrong = sorted(set(blocks) - set(range(count)))
    if wrong or not set(range(count)) - set(blocks):
        problem = f"there is no block {wrong[0]}" if wrong else "no block would be left"
        raise ShrinkError(
            f"{problem}: '{chain.name}' has {count}",
            f"give some of the numbers from 0 to {count - 1}, and keep at least one",
        )
    return [number for number in range(count) if number not in set(blocks)]


def _rebuilt(model: Any, chain: BlockChain, kept: Sequence[int]) -> nn.Module:
    """Return the model that the class builds with fewer layers, with the weights of those that stay."""
    config = _shorter_config(model.config, len(chain.blocks), kept)
    try:
        config.validate()
        with torch.device("meta"):
            small = type(model)(config)
    except Exception as error:  # a class says in its own way that a configuration is none
        raise ShrinkError(
            f"{type(model).__name__} does not build a model of {len(kept)} blocks: {error}",
            "keep the blocks, or remove units of groups instead",
        ) from error
    _fill(small, _renumbered(model, chain, kept), type(model).__name__)
    if hasattr(model, "generation_config"):
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)


def _shorter_config(config: Any, count: int, kept: Sequence[int]) -> Any:
    """Return a configuration with fewer layers, and its lists of one entry a layer cut alike."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    if getattr(text, "num_hidden_layers", None) != count:
        raise ShrinkError(
            f"{type(text).__name__} does not say with num_hidden_layers that there are {count} blocks",
            "remove units of groups instead of whole blocks",
        )
    # What every configuration has is not by layer, whatever its length: the ids that end a text, for one.
    general = vars(PreTrainedConfig()).keys() | vars(GenerationConfig()).keys()
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and name not in general:
            setattr(text, name, type(value)(value[number] for number in kept))
    text.num_hidden_layers = len(kept)
    return small


def _renumbered(model: nn.Module, chain: BlockChain, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return all weights but those of blocks that go, by their names in the smaller model."""
    places = {str(number): str(place) for place, number in enumerate(kept)}
    found: dict[str, Tensor] = {}
    for name, weight in named_weights(model):
        if name.startswith(f"{chain.name}."):
            number, _, rest = name.removeprefix(f"{chain.name}.").partition(".")
            if number not in places:
                continue
            name = f"{chain.name}.{places[number]}.{rest}"
        found[name] = weight
    return found


def _fill(small: nn.Module, weights: Mapping[str, Tensor], title: str) -> None:
    """Give a model on the meta device copies of weights; what is one tensor there stays one."""
    copies: dict[int, Tensor] = {}
    # Buffers may be left over: a class keeps rotary frequencies for those types of layers only that it has.
    missing = {name for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
    for path, module in small.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for name, built in store.items():
                full = f"{path}.{name}" if path else name
                weight = weights.get(full)
                if built is None and weight is None:
                    continue
                if built is None or weight is None or built.shape != weight.shape:
                    raise _unlike(full, title)
                copies.setdefault(id(weight), _copied(weight))
                store[name] = copies[id(weight)]
                missing.discard(full)
    if missing:
        raise _unlike(min(missing), title)


def _copied(weight: Tensor) -> Tensor:
    twin = weight.detach().clone()
    return nn.Parameter(twin, weight.requires_grad) if isinstance(weight, nn.Parameter) else twin


def _unlike(name: str, title: str) -> ShrinkError:
    return ShrinkError(
        f"a {title} with fewer layers has no '{name}' of the same shape",
        "give a model as its class builds it, or keep the first block if the others read what it holds",
    )


def _shortened(model: nn.Module, chain: BlockChain, kept: Sequence[int]) -> nn.Module:
    small = copy.deepcopy(model)
    blocks = small.get_submodule(chain.name)
    blocks._modules = {str(place): blocks._modules[str(number)] for place, number in enumerate(kept)}
    return small


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a model puts out, or raise what its own code raises as a `ShrinkError`."""
    try:
        return [leaf for leaf in tree_leaves(run(model, inputs)) if isinstance(leaf, Tensor)]
    except Exception as error:  # whatever a stranger's forward raises
        raise ShrinkError(
            f"{type(model).__name__} does not run with fewer blocks: {error}",
            "let its forward run over the list of its blocks, however many there are",
        ) from error


def _compare(ours: Sequence[Tensor], expected: Sequence[Tensor], model: nn.Module) -> None:
    if [output.shape for output in ours] != [output.shape for output in expected]:
        raise _other_outputs(model, "its outputs have other shapes")
    for output, reference in zip(ours, expected):
        apart = (output.double() - reference.double()).abs().max() if output.numel() else 0.0
        size = reference.double().abs().max() if output.numel() else 1.0
        if not float(apart) <= TOLERANCE * float(size):
            raise _other_outputs(model, f"its outputs are off by {float(apart / size):.1e} of their size")


def _other_outputs(model: nn.Module, problem: str) -> ShrinkError:
    return ShrinkError(
        f"{type(model).__name__} with fewer blocks computes something else than with their contributions left out: "
        f"{problem}",
        "a block's number matters to what it computes; remove other blocks, or units of groups instead",
    )
