"""Time and memory of the coupling analysis, side by side with Torch-Pruning on the same models in one run.

    pip install torch-pruning==1.6.1
    python examples/benchmarks/coupling.py

Every measurement is a process of its own, on one thread; models have random weights, or none (meta). CPU seconds are
the numbers to compare. What is timed: *trace* (ours: ``gp.trace``; theirs: ``build_dependency``), *groups* (ours:
``gp.node_groups``; theirs: ``get_all_groups``, which yields members as index lists), *members* (ours: the owner of
every index of every member of every group). Torch-Pruning gets the same model with eager attention, without which it
fails on grouped-query attention.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    **{
        f"Llama, {layers} layers": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": layers,
                                    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000}
        for layers in (8, 16, 32, 64)
    },
    "Llama, 8 layers, 4 × as wide": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8,
                                     "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "LLaMA-7B, meta": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                       "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "LLaMA-70B, meta": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip


def measure_ours(model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Time trace, groups and members of graphprune."""
    import graphprune as gp
    from graphprune.coupling.rules import rule_for

    rule_for("aten.linear.default")  # imports the rules; imports are timed for neither tool
    laps = Laps()
    graph = gp.trace(model, inputs)
    laps.lap("trace")
    groups = gp.node_groups(graph)
    laps.lap("groups")
    for group in groups.values():
        for member in group.members:
            group.owner(member)
    laps.lap("members")
    return {**laps.seconds, "found": len(groups)}


def measure_theirs(model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Time trace and groups of Torch-Pruning."""
    import torch_pruning as tp

    laps = Laps()
    graph = tp.DependencyGraph().build_dependency(
        model, inputs, forward_fn=lambda m, given: m(**given), output_transform=lambda out: out.logits.sum()
    )
    laps.lap("trace")
    found = sum(1 for _ in graph.get_all_groups(ignored_layers=[model.lm_head]))
    laps.lap("groups")
    return {**laps.seconds, "found": found}


class Laps:
    """CPU seconds between calls of `lap`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        """Note the time since the last lap under `name`."""
        now = time.process_time()
        self.seconds[name], self._last = now - self._last, now


def measure(tool: str, shape: str) -> None:
    """Measure one tool on one model in this process, and print JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=128, use_cache=False)
    if tool == "Torch-Pruning":
        config._attn_implementation = "eager"
    with torch.device("meta" if "meta" in shape else "cpu"):
        model = LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.arange(22).reshape(2, 11)}
    before = _peak_megabytes()
    numbers = measure_ours(model, inputs) if tool == "graphprune" else measure_theirs(model, inputs)
    print(json.dumps({**numbers, "peak": _peak_megabytes(), "added": _peak_megabytes() - before}))


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(shapes: list[str], limit: float) -> None:
    """Measure both tools on each model, and print a table."""
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores\n")
    print("| model | tool | trace s | groups s | members s | peak MB | groups found | groups: ratio |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for shape in shapes:
        ours = None
        for tool in ("graphprune", "Torch-Pruning"):
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--tool", tool, "--shape", shape],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=limit,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            except subprocess.TimeoutExpired:
                print(f"| {shape} | {tool} | stopped after {limit:.0f} s | | | | | |", flush=True)
                continue
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["failed"])[-1][:90]
                print(f"| {shape} | {tool} | fails: {last} | | | | | |", flush=True)
                continue
            row = json.loads(done.stdout.strip().splitlines()[-1])
            ours = ours or row
            ratio = f"{row['groups'] / ours['groups']:.1f}" if row is not ours else ""
            members = f"{row['members']:.3f}" if "members" in row else "with groups"
            print(
                f"| {shape} | {tool} | {row['trace']:.2f} | {row['groups']:.3f} | {members} | {row['peak']:.0f} "
                f"| {row['found']} | {ratio} |",
                flush=True,
            )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="measure this model alone")
    parser.add_argument("--tool", choices=["graphprune", "Torch-Pruning"], help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one tool on one model")
    given = parser.parse_args()
    if given.tool:
        measure(given.tool, given.shape[0])
    else:
        compare(given.shape or list(SHAPES), given.limit)


if __name__ == "__main__":
    main()
