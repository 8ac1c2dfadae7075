"""What every room's tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from tiny_models import Traced, tiny_llama, traced
from torch.onnx._internal.exporter._registration import ONNXRegistry

from graphprune.source.adapters import attach_adapters

settings.register_profile("graphprune", deadline=None, derandomize=True, max_examples=200)
settings.register_profile("deep", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "graphprune"))


def pytest_collection_finish() -> None:
    """Keep what was imported out of every later collection of garbage, which would look at half a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> Iterator[None]:
    """Make the ONNX exporter's table once a session: it does for each model, which takes longer than small ones do."""
    made = cache(ONNXRegistry.from_torchlib)
    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(made)):
        yield


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
