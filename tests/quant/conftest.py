"""Property tests draw the same examples at every run, and tiny tensors are computed on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from stream_checkpoints import checkpoint_tensors, save_checkpoint

settings.register_profile("graphprune", deadline=None, derandomize=True)
settings.load_profile("graphprune")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of two blocks in two files."""
    return save_checkpoint(tmp_path / "source", checkpoint_tensors())
