"""Several processes share each batch, and take the steps that one alone would take."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import shared_training
import torch
from safetensors.torch import load_file


def environment(**more):
    paths = os.pathsep.join(
        [str(Path(shared_training.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_two_processes_come_to_the_adapters_of_one(tmp_path):
    port = free_port()
    group = [
        environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in ("0", "1")
    ]
    command = [sys.executable, shared_training.__file__, str(tmp_path / "two"), str(tmp_path / "kept")]
    running = [subprocess.Popen(command, env=own) for own in group]
    shared_training.shared_recovery(tmp_path / "one", tmp_path / "kept alone")
    assert [process.wait(timeout=180) for process in running] == [0, 0]
    alone, shared = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-5)
    assert any(float(value.abs().max()) > 0 for name, value in alone.items() if "lora_B" in name)
