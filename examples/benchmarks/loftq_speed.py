"""LoftQ's time and error, side by side with PEFT's `loftq_init` on the same Gaussian matrices in one run.

    pip install bitsandbytes
    python examples/benchmarks/loftq_speed.py

PEFT's function runs as it is installed, but for its device: it demands CUDA or XPU, and is given the CPU. It no longer
quantizes to 2 bits; there its loop runs with its own decomposition and our NF2. CPU seconds of one thread each. The
errors are ``||W - Q - B A|| / ||W||``.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from peft.utils import loftq_utils
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quant import loftq, quantize
from quant.loftq import relative_error

Factors = tuple[Tensor, Tensor, Tensor]
FORMATS = {4: "nf4", 2: "nf2"}


def peft_on_cpu() -> Callable[..., Factors]:
    """Return PEFT's `loftq_init`, its source unchanged but for the device."""
    source = inspect.getsource(loftq_utils.loftq_init)
    changed = source.replace('"xpu" if is_xpu_available() else "cuda"', '"cpu"')
    if changed == source:
        raise SystemExit("this version of PEFT chooses its device otherwise: adapt the benchmark")
    names = dict(vars(loftq_utils))
    exec(compile(changed, loftq_utils.__file__, "exec"), names)
    return names["loftq_init"]


def peft(weight: Tensor, bits: int, rank: int, iterations: int) -> Factors:
    """PEFT's function at 4 bits, and at 2 bits the loop that its versions up to 0.19 had."""
    if bits == 4:
        return peft_on_cpu()(weight, bits, rank, iterations)
    left = torch.zeros(len(weight), rank)
    right = torch.zeros(rank, weight.shape[1])
    for _ in range(iterations):
        dequantized = quantize(weight - left @ right, "nf2").dequantize()
        found = loftq_utils._low_rank_decomposition(weight - dequantized, reduced_rank=rank)
        left, right = found["L"], found["R"]
    return dequantized, right, left


def ours(weight: Tensor, bits: int, rank: int, iterations: int) -> Factors:
    """Our LoftQ in the same format."""
    found = loftq(weight, FORMATS[bits], rank, iterations)
    return found.quantized.dequantize(), found.lora_A, found.lora_B


def timed(weight: Tensor, run: Callable[[], Factors]) -> tuple[float, float]:
    """Return CPU seconds and the relative error."""
    start = time.process_time()
    dequantized, right, left = run()
    seconds = time.process_time() - start
    return seconds, relative_error(weight, dequantized + left @ right)


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "4096x4096", "4096x11008"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--iterations", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "matrix", "bits", "rank", "PEFT s", "ours s", "times as fast", "PEFT error", "ours", "ratio",
        title=f"LoftQ, {arguments.iterations} iterations, {platform.machine()}, one thread, seed 0",
    )  # fmt: skip
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        for bits in (4, 2):
            for rank in arguments.ranks:
                theirs = timed(weight, partial(peft, weight, bits, rank, arguments.iterations))
                mine = timed(weight, partial(ours, weight, bits, rank, arguments.iterations))
                table.add_row(
                    shape, str(bits), str(rank), f"{theirs[0]:.1f}", f"{mine[0]:.2f}",
                    f"{theirs[0] / mine[0]:.1f}", f"{theirs[1]:.5f}", f"{mine[1]:.5f}", f"{mine[1] / theirs[1]:.5f}",
                )  # fmt: skip
                print(f"{shape}, {bits} bits, rank {rank}: done", file=sys.stderr)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
