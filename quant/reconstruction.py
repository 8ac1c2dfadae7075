"""Training a block's codes, scales and adapters together, until it puts out what the dense block did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.chain import BlockCall, run_block
from quant.config import Reconstruction
from quant.linear import QuantLinear
from quant.live import LiveLinear
from quant.tree import replace_module_

WARM_UP, LEAST_RATE = 0.05, 0.02
"""Share of the steps in which the learning rates rise, and of themselves that they fall to."""


@dataclass(frozen=True, slots=True, eq=False)
class Reconstructed:
    """What training made of a block.

    Attributes:
        outputs: What it puts out, call by call.
        before: Its error before: the mean over tokens of ``|y - y'|² / |y|²`` for outputs y of the dense block.
        after: The same afterwards, never more than before.
    """

    outputs: list[Tensor]
    before: float
    after: float


def reconstruct_block_(
    block: nn.Module,
    calls: Sequence[BlockCall],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    settings: Reconstruction,
    seed: int = 0,
) -> Reconstructed:
    """Train the packed layers of a block in place, so that it gives the dense block's outputs for inputs of its own.

    A code is the level nearest to a number that is trained with straight-through gradients. Scales and offsets have the
    gradients that they have with the codes of the moment: LSQ's, in which codes follow the scale, made blocks worse.
    Where all that leaves a greater error than before, the layers stay as they were.

    Args:
        block: With `QuantLinear` layers; everything else in it is frozen.
        calls: How the block is called.
        inputs: What it gets in the quantized model, call by call.
        targets: What the dense block puts out in the dense model.
        settings: Passes and learning rates.
        seed: Of the order of the calls.

    Source: BRECQ (arXiv 2102.05426) for blocks as the unit; EfficientQAT (arXiv 2407.11062) section 3.2 for the
    training of weights and scales together.
    """
    packed = {name: module for name, module in block.named_modules() if isinstance(module, QuantLinear)}
    before_outputs = run_block(block, calls, inputs)
    before = _error(before_outputs, targets)
    adapters = {
        name: tuple(factor.detach().clone() for factor in _factors(layer)) for name, layer in packed.items()
    }
    live = {name: LiveLinear(layer) for name, layer in packed.items()}
    for name, layer in packed.items():
        replace_module_(block, layer, live[name])
    finite = _train(block, list(live.values()), calls, inputs, targets, settings, seed)
    if finite:
        for trained in live.values():
            replace_module_(block, trained, trained.packed())
        outputs = run_block(block, calls, inputs)
        after = _error(outputs, targets)
        if after <= before:
            return Reconstructed(outputs, before, after)
    for name, layer in packed.items():
        replace_module_(block, block.get_submodule(name), layer)
        for factor, kept in zip(_factors(layer), adapters[name], strict=True):
            factor.data.copy_(kept)
    return Reconstructed(before_outputs, before, before)


def _train(
    block: nn.Module,
    layers: list[LiveLinear],
    calls: Sequence[BlockCall],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    settings: Reconstruction,
    seed: int,
) -> bool:
    """Train a block, and return whether all numbers stayed finite."""
    groups = [group for layer in layers for group in _rates(layer, settings) if group["lr"] > 0]
    trained = [parameter for group in groups for parameter in group["params"]]
    steps = settings.epochs * len(calls)
    if not trained:
        return True
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for index in torch.randperm(len(calls), generator=generator).tolist():
            with torch.enable_grad():
                output = calls[index].run(block, inputs[index], gradients=True)
                loss = _token_errors(output, targets[index]).mean()
            loss.backward(inputs=trained)
            if not all(bool(held.grad.isfinite().all()) for held in trained if held.grad is not None):
                return False
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return True


def _rates(layer: LiveLinear, settings: Reconstruction) -> list[dict[str, Any]]:
    scales = [layer.scale] if layer.offset is None else [layer.scale, layer.offset]
    levels = layer.format.levels
    gap = float(levels[-1] - levels[0]) / (len(levels) - 1)
    size = float(layer.scale.detach().abs().mean())
    return [
        {"params": [layer.latent], "lr": settings.code_rate * gap},
        {"params": scales, "lr": settings.scale_rate * size * gap},
        {"params": list(_factors(layer.layer)), "lr": settings.adapter_rate},
    ]


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rates at a step: a linear rise, then half a cosine."""
    falling = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / max(1, WARM_UP * steps)) * (LEAST_RATE + (1 - LEAST_RATE) * falling)


def _error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    errors = [_token_errors(output, target) for output, target in zip(outputs, targets, strict=True)]
    return float(torch.cat(errors).mean())


def _token_errors(output: Tensor, target: Tensor) -> Tensor:
    """Return ``|y - y'|² / |y|²`` of each token: relative, so that the few huge ones do not decide alone."""
    difference = (output.float() - target.float()).square().sum(-1)
    size = target.float().square().sum(-1)
    return (difference / size.clamp(min=torch.finfo(torch.float32).tiny)).reshape(-1)


def _factors(layer: QuantLinear) -> tuple[nn.Parameter, ...]:
    return tuple(factor for factor in (layer.lora_A, layer.lora_B) if factor is not None)
