"""Time and memory of LoftQ over a checkpoint on disk, a layer at a time, in the shapes of LLaMA-7B.

    python examples/benchmarks/stream.py --blocks 2

Writes a checkpoint of a few of the 32 blocks and the embedding (random bfloat16, 1.1 GB for two blocks) to a temporary
folder, which it deletes, and runs `loftq_checkpoint` over it. Every run is a process of its own, on one thread. CPU
seconds are the numbers to compare; wall seconds mean something on an idle machine alone, and so does the speed-up by
two processes. Peak memory is the largest resident set that the operating system saw (`getrusage`), with torch and the
pages of mapped files in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH, INNER, VOCABULARY, BLOCKS = 4096, 11008, 32000, 32
MATRICES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}


def main() -> None:
    """Measure all combinations asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=2, help=f"of {BLOCKS}; each takes 0.4 GB of disk")
    parser.add_argument("--formats", nargs="+", default=["nf4", "uint2"])
    parser.add_argument("--iterations", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        call("write", folder, str(given.blocks))
        print(
            f"LLaMA-7B shapes, {given.blocks} of {BLOCKS} blocks, rank 16, block size 64, one thread a process\n"
        )
        print(
            "| format | T | processes | CPU s a block | CPU min for 32 | wall s a block | peak MB | bytes / float16 |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for format in given.formats:
            for iterations in given.iterations:
                for processes in given.processes:
                    print(row(folder, given.blocks, format, iterations, processes), flush=True)


def row(folder: str, blocks: int, format: str, iterations: int, processes: int) -> str:
    """Run one combination and return its line of the table; more than one process are started as torchrun would."""
    output = f"{folder}/{format}-{iterations}-{processes}"
    begun = time.monotonic()
    running = [
        start("quantize", f"{folder}/source", output, format, str(iterations), rank=rank, processes=processes)
        for rank in range(processes)
    ]
    found = [json.loads(finish(process)) for process in running]
    wall = (time.monotonic() - begun) / blocks
    cpu = sum(each["cpu"] for each in found) / blocks
    peak = max(each["peak_mb"] for each in found)
    ratio = found[0]["bytes_after"] / found[0]["bytes_before"]
    call("remove", output)
    return (
        f"| {format} | {iterations} | {processes} | {cpu:.1f} | {cpu * BLOCKS / 60:.0f} | {wall:.1f} "
        f"| {peak:.0f} | {ratio:.1%} |"
    )


def child(task: str, *arguments: str) -> None:
    """Do one thing in a process of its own: the parent stays small, since a child's peak begins with its parent's."""
    import shutil

    if task == "remove":
        shutil.rmtree(arguments[0])
    elif task == "write":
        write_checkpoint(Path(arguments[0]), int(arguments[1]))
    else:
        quantize(*arguments)


def quantize(source: str, output: str, format: str, iterations: str) -> None:
    """Run LoftQ over the checkpoint and print what it took as JSON."""
    from quant.stream import StreamConfig, loftq_checkpoint

    begun = time.process_time()
    reports = loftq_checkpoint(source, output, StreamConfig(format=format, iterations=int(iterations)))
    found = {
        "cpu": time.process_time() - begun,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes_before": sum(report.bytes_before for report in reports),
        "bytes_after": sum(report.bytes_after for report in reports),
    }
    print(json.dumps(found))


def write_checkpoint(folder: Path, blocks: int) -> None:
    """Write random weights, a block a file, as `save_pretrained` lays them out."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    source = folder / "source"
    source.mkdir()
    outside = {
        "model.embed_tokens.weight": drawn(VOCABULARY, WIDTH),
        "model.norm.weight": torch.ones(WIDTH).bfloat16(),
    }
    files = {"model-outside.safetensors": outside}
    weight_map = dict.fromkeys(outside, "model-outside.safetensors")
    del outside
    for block in range(blocks):
        tensors = {f"model.layers.{block}.{name}.weight": drawn(*shape) for name, shape in MATRICES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        files[f"model-{block:05d}.safetensors"] = tensors
        weight_map.update(dict.fromkeys(tensors, f"model-{block:05d}.safetensors"))
        for name in list(files):
            save_file(files.pop(name), source / name)
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def start(*arguments: str, rank: int = 0, processes: int = 1) -> subprocess.Popen[str]:
    """Start this file as one of several processes, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(processes)}
    command = [sys.executable, __file__, "--child", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Return what a process printed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return output


def call(*arguments: str) -> str:
    """Run this file with other arguments and return what it printed."""
    return finish(start(*arguments))


if __name__ == "__main__":
    main()
