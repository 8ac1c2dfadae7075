"""What every room's tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from tiny_models import Traced, tiny_llama, traced

from graphprune.source.adapters import attach_adapters

settings.register_profile("graphprune", deadline=None, derandomize=True, max_examples=200)
settings.register_profile("deep", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "graphprune"))


@pytest.fixture(scope="session")
def build_llama() -> Callable[..., Any]:
    return tiny_llama


@pytest.fixture(scope="session")
def llama() -> Traced:
    """The tiny Llama as it is; do not change it."""
    return traced(tiny_llama())


@pytest.fixture(scope="session")
def adapted() -> Traced:
    """The tiny Llama with LoRA adapters on all seven linears, their B not zero; do not change it."""
    model = attach_adapters(tiny_llama(), rank=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return traced(model)
