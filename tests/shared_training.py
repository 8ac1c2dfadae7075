"""Run by every process of a group: one recovery that they share; writes its adapters."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny_models import tiny_llama

from graphprune.recipe import Recover, Training
from graphprune.recover.recovery import recover
from graphprune.recover.sources import Source
from graphprune.source.adapters import attach_adapters
from graphprune.source.text import IGNORED, Windows


def shared_recovery(target: Path, checkpoint: Path) -> None:
    """Recover a model with five rows a batch, each with its own number of learned tokens, and save its adapters."""
    torch.manual_seed(0)
    model = attach_adapters(tiny_llama(seed=3), 2, 4)
    ids = torch.randint(3, 60, (20, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(20):
        labels[row, : row % 9] = IGNORED
    sources = []
    for name, start in (("a", 0), ("b", 10)):
        windows = Windows(ids[start : start + 10], name, labels[start : start + 10])
        held, train = windows.chosen(torch.arange(3)), windows.chosen(torch.arange(3, 10))
        sources.append(Source(name, "text", train, held))
    training = Training(learning_rate=1e-3, batch_size=5, precision="float32")
    settings = Recover(steps=6, rounds=2, patience=9, accumulate=2, training=training)
    recover(model, tiny_llama(seed=2), settings, sources, seed=1, checkpoint=checkpoint)
    if Accelerator().is_main_process:
        save_file({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, target)


if __name__ == "__main__":
    shared_recovery(Path(sys.argv[1]), Path(sys.argv[2]))
